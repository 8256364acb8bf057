"""One run at a time in a run directory, one process at a time at a piece of work."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from sftdist.core.errors import StartupError

_ADVICE = "One run at a time may write to a run directory: wait for it, stop it, or give another run.dir."
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


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
                who = _signature(file)
                file.close()
                raise StartupError(f"{self.path.parent} is in use by {who} (waited {self._wait:.0f} s). {self._advice}")
            time.sleep(min(0.2, self._wait / 5 + 0.01))
        _sign(file)
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
            return _signature(file)
    return None


@contextmanager
def alone(path: Path, waiting: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock file `path`, whose folder is made; `waiting` is told who holds it, if one has to wait for that.

    The holder may remove file and folder before it lets go: those that waited make new ones. Given up when the process
    ends, however it ends. False where the file system has no locks: then nobody waits. Not for two threads.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the holder has removed the folder just now
            continue
        with file:
            locked = _wait_for_lock(file, waiting)
            if locked and not _is_still(path, file):
                continue
            if locked:
                _sign(file)
            yield locked
            return


def _wait_for_lock(file: TextIO, waiting: Callable[[str], None]) -> bool:
    try:
        if not _try_lock(file):
            waiting(_signature(file))
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_still(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _sign(file: TextIO) -> None:
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def _signature(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the two answers that POSIX allows for "locked"
        return False
    return True
