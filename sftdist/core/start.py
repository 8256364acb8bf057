"""Which start of the ranks this process belongs to: what an earlier start has left is told from its own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

START_VARIABLE = "SFTDIST_START"  # the name that `agent.launch` gives to one start of the agent
OURS = START_VARIABLE in os.environ  # before a name is adopted: whether `agent.launch` has started this process


def this_start() -> str | None:
    """The same text in every process and every restart of one torchrun agent; None without an agent.

    Under a torchrun that `agent.launch` has not started it is the agent's host, process and the time it began (in
    containers the process ids of two starts are often equal).
    """
    given = os.environ.get(START_VARIABLE)
    if given is not None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return given
    agent = os.getppid()
    stat = Path(f"/proc/{agent}/stat")
    began = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "?"  # field 22 of proc(5)
    return f"{socket.gethostname()}/{agent}/{began}"


def adopt_start(start: str | None) -> None:
    """Call this start what rank 0 calls it: on other hosts other agents run, but any rank may report a failure."""
    if start is not None:
        os.environ[START_VARIABLE] = start
