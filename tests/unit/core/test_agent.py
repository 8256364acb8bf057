from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sftdist.core import agent
from sftdist.core.failure import ERROR, here, write_failure
from sftdist.core.progress import Activity
from sftdist.core.start import this_start
from tests.conftest import ROOT


def test_exit_code_comes_from_the_file_not_from_torchrun(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    agent.write_status(tmp_path, "preempted", 75, "of an earlier start")
    write_failure(tmp_path, here(ERROR, 0, Activity(), "of an earlier start"))
    assert agent.launch("tests.saver", [str(tmp_path), "2"], 1, tmp_path, 30) == 2
    assert "of an earlier start" not in capfd.readouterr().err


def test_a_killed_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert agent.launch("tests.saver", [str(tmp_path), "kill"], 1, tmp_path, 30) == 1
    status = agent.read_status(tmp_path)
    assert status is not None
    assert status["state"] == "failed"
    assert "rank 0" in status["reason"]
    assert "SIGKILL" in status["reason"]
    assert status["step"] == 3
    assert "rank 0" in capfd.readouterr().err.splitlines()[-1]


def test_a_save_survives_repeated_signals(tmp_path: Path) -> None:
    """A cluster signals every process, often twice; with torchrun's defaults USR1 kills the agent at once, and any
    third signal does in any case."""
    process = _start("launched", str(tmp_path), "60")
    _wait_for(lambda: (tmp_path / "status.json").exists())
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    _wait_for(lambda: (tmp_path / "signals").exists())
    assert (tmp_path / "signals").read_text().split() == ["SIGUSR1"], "passed on once"
    everybody = process.pid, *_children(process.pid), int((tmp_path / "pid").read_text())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2):
        for pid in everybody:
            with suppress(ProcessLookupError):  # on a slow machine it may have saved by now
                os.kill(pid, number)
        time.sleep(0.2)
    assert process.wait(60) == 75


def test_a_save_longer_than_its_grace_is_cut(tmp_path: Path) -> None:
    process = _start("launched", str(tmp_path), "1")
    _wait_for(lambda: (tmp_path / "status.json").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == agent.FAILED
    assert "grace_seconds" in _status(tmp_path)["reason"]


def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    process = _start("parent", str(tmp_path))
    _wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    rank = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{rank}").exists()
    process.kill()
    process.wait()
    _wait_for(lambda: not _runs(rank), 10)


def test_stopped_before_the_first_step_is_preempted(tmp_path: Path) -> None:
    assert agent._exit_code(tmp_path, None, 1, stopped=True) == agent.PREEMPTED
    status = agent.read_status(tmp_path)
    assert status is not None
    assert status["state"] == "preempted"


@pytest.mark.parametrize("code", [agent.FAILED, agent.PREEMPTED])
def test_what_a_signal_costs_is_in_the_status(tmp_path: Path, code: int) -> None:
    """A save that was cut is a failure; before the first step and in the export nothing could be lost."""
    agent.write_status(tmp_path, "running", code)
    assert agent._exit_code(tmp_path, None, 1, stopped=True) == code
    agent.write_status(tmp_path, "running", code)
    assert agent._exit_code(tmp_path, None, agent.PREEMPTED, stopped=False) == code, "a rank took the signal itself"
    agent.write_status(tmp_path, "running", code)
    assert agent._exit_code(tmp_path, None, 1, stopped=False) == agent.FAILED, "nobody asked it to stop"


def test_restarts_are_counted_and_the_last_failure_comes_last(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert agent.launch("tests.children", ["again", str(tmp_path)], 1, tmp_path, 30, max_restarts=1) == agent.FAILED
    assert sorted(path.name for path in tmp_path.glob("attempt-*")) == ["attempt-0", "attempt-1"]
    assert "attempt 1 went wrong" in "\n".join(capfd.readouterr().err.splitlines()[-2:])


@pytest.mark.parametrize(
    ("state", "code", "retry", "refused"),
    [
        ("failed", 2, True, True),
        ("failed", 3, True, True),
        ("preempted", 75, True, True),
        ("failed", 1, False, True),
        ("failed", 1, True, False),
        ("running", 1, True, False),
        ("running", 75, True, False),
    ],
)
def test_what_a_restarted_group_does_not_train_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, code: int, retry: bool, refused: bool
) -> None:
    agent.write_status(tmp_path, state, code, "why", retry=retry)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (agent.restart_refused(tmp_path) is not None) == refused
    monkeypatch.setenv("SFTDIST_START", "another")
    assert agent.restart_refused(tmp_path) is None, "an earlier start's end is no reason not to try again"
    monkeypatch.delenv("SFTDIST_START")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert agent.restart_refused(tmp_path) is None, "a new start by a person goes on"


def test_a_start_has_one_name_in_all_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_start() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    mine = this_start()
    assert mine is not None
    assert str(os.getppid()) in mine
    assert mine == this_start()
    monkeypatch.setenv("SFTDIST_START", "given")
    assert this_start() == "given"


def _status(run_dir: Path) -> dict[str, Any]:
    status = agent.read_status(run_dir)
    assert status is not None
    return status


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _start(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.children", *words], cwd=ROOT, env=os.environ)


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_the_status_of_a_run_that_holds_the_directory_is_left_alone(tmp_path: Path) -> None:
    """A second start that never got the lock ends with 1 and does not touch what the first one wrote."""
    agent.write_status(tmp_path, "running", 1, "the first start")
    before = agent.read_status(tmp_path)
    assert agent.launch("tests.children", ["nothing"], 1, tmp_path, 5) == agent.FAILED
    assert agent.read_status(tmp_path) == before
