from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from sftdist.core.errors import StartupError
from sftdist.core.lock import RunLock


def _holder(folder: Path) -> int:
    """A process that holds the lock until it is killed, with a child of its own that outlives it."""
    pid = os.fork()
    if pid == 0:
        with RunLock(folder):
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            (folder / "ready").touch()
            time.sleep(60)
        os._exit(0)
    while not (folder / "ready").exists():
        time.sleep(0.01)
    return pid


def test_a_second_run_waits_then_names_the_first_and_may_go_on_when_it_dies(tmp_path: Path) -> None:
    pid = _holder(tmp_path)
    began = time.monotonic()
    with pytest.raises(StartupError, match=rf"in use by process {pid} on .*run\.dir"), RunLock(tmp_path, 0.5):
        pass
    assert 0.5 <= time.monotonic() - began < 5
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunLock(tmp_path, 0.5):  # its child does not hold it
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_a_lock_that_is_given_up_while_waiting_is_taken(tmp_path: Path) -> None:
    pid = _holder(tmp_path)
    if os.fork() == 0:
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
        os._exit(0)
    with RunLock(tmp_path, 10):
        pass
    os.waitpid(pid, 0)
