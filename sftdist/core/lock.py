"""One run at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from sftdist.core.errors import StartupError

_ADVICE = "One run at a time may write to a run directory: wait for it, stop it, or give another run.dir."


class RunLock:
    """Context manager: an exclusive lock on `run_dir`, given up when the process ends, however it ends.

    A second process waits `wait_seconds`, then StartupError names the holder and gives `advice`. The lock is a POSIX
    record lock: forked children do not inherit it, and it works between hosts on a shared file system that has locks.
    """

    def __init__(self, run_dir: Path, wait_seconds: float = 30.0, advice: str = _ADVICE) -> None:
        self.path = run_dir / ".lock"
        self._wait = wait_seconds
        self._advice = advice
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + self._wait
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise StartupError(
                    f"{self.path.parent} is in use by {holder} (waited {self._wait:.0f} s). {self._advice}"
                )
            time.sleep(min(0.2, self._wait / 5 + 0.01))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def holder(run_dir: Path) -> str | None:
    """Who is using a run directory, in the words it wrote there; None where nobody is. Nothing is changed.

    Not for a process that holds the lock itself: POSIX gives all of its locks up when one handle is closed.
    """
    path = run_dir / ".lock"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return file.read().strip() or "another process"
    return None


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the two answers that POSIX allows for "locked"
        return False
    return True
