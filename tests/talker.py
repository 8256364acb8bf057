"""Ranks that talk in every way there is, then rank 1 ends in one: `python -m tests.talker RUN_DIR HOW[,HOW ...]`.

A HOW for each start of the worker group. Without torchrun it starts two ranks under our agent, as `sftdist train` does.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

from sftdist.core import agent
from sftdist.core.command import Command, run_command
from sftdist.core.distributed import StopSignal, is_worker, restart_count, session
from sftdist.core.errors import DataError
from sftdist.core.ranklog import rank_log

logging.basicConfig()  # before the log is opened, as libraries do when they are imported
NATIVE = b"terminate called after throwing an instance of 'std::bad_function_call'\n"


def talk(rank: int) -> None:
    print(f"rank {rank} prints")
    warnings.warn(f"rank {rank} warns", stacklevel=1)
    logging.getLogger("library").error(f"rank {rank} logs")
    os.write(2, f"rank {rank} writes natively\n".encode())
    subprocess.run(["echo", f"rank {rank} has a child"], check=True)


def end(how: str) -> None:
    if how == "fault":
        raise ValueError("a fault of ours")
    if how == "error":
        raise DataError("say what to change")
    if how == "kill":
        print("half a line of rank 1", end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "abort":
        os.write(2, NATIVE)
        os.abort()


def run(run_dir: Path, how: str) -> None:
    """One rank."""
    StopSignal().install()  # torchrun sends TERM to the rest: a trainer takes it as "after this step"
    with rank_log(run_dir, restart_count() + 1), session(report=partial(agent.report, run_dir)) as world:
        if world.is_main:
            agent.write_status(run_dir, "running", agent.FAILED)
        talk(world.rank)
        world.barrier()
        if how == "done":
            return
        if world.rank == 1:
            end(how)
        time.sleep(120)


def main(folder: str, hows: str) -> int:
    run_dir = Path(folder)
    if not is_worker():
        return agent.launch("tests.talker", [folder, hows], 2, run_dir, 30, max_restarts=hows.count(","))
    how = hows.split(",")[restart_count()]
    command: Command[str] = Command(
        name="talker",
        load=lambda words: how,
        pack=lambda word: {"how": word},
        unpack=lambda packed: str(packed["how"]),
        show=str,
        help=str,
        sweep=len,
        run=partial(run, run_dir),
    )
    return run_command(command, [])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
