"""Other processes of this host, seen through /proc, and the cores that this one may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def alive(pid: int) -> bool:
    """False for a process that has ended, reaped or not. Without a /proc nobody can be declared dead."""
    return _state(pid) not in "ZX"


def stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP) or a debugger holds the process."""
    return _state(pid) in "Tt"


def usable_cores() -> int:
    """How many cores this process may run on: a cluster's job often has few of its host's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _state(pid: int) -> str:
    """The letter that proc(5) describes; X where the process is gone, ? where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X" if Path("/proc/self/stat").exists() else "?"
    except ProcessLookupError:
        return "X"
