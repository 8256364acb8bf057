from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sftdist.core import agent
from tests.conftest import ROOT


def test_exit_code_comes_from_the_file_not_from_torchrun(tmp_path: Path) -> None:
    agent.write_status(tmp_path, "preempted", 75, "of an earlier start")
    assert agent.launch("tests.saver", [str(tmp_path), "2"], 1, tmp_path, 30) == 2


def test_a_killed_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert agent.launch("tests.saver", [str(tmp_path), "kill"], 1, tmp_path, 30) == 1
    status = agent.read_status(tmp_path)
    assert status is not None
    assert status["state"] == "failed"
    assert "rank 0" in status["reason"]
    assert "SIGKILL" in status["reason"]
    assert status["step"] == 3
    assert "rank 0" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("signals", [[signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]])
def test_a_save_survives_repeated_signals(tmp_path: Path, signals: list[int]) -> None:
    """A cluster signals every process, often twice; with torchrun's defaults USR1 kills the agent at once."""
    process = _start("launched", str(tmp_path), "60")
    _wait_for(lambda: (tmp_path / "status.json").exists())
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    assert process.wait(60) == 75
    assert (tmp_path / "signals").read_text().split() == ["SIGUSR1"], "passed on once"


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


def test_killed_in_the_save_is_a_failure(tmp_path: Path) -> None:
    agent.write_status(tmp_path, "running", 1)
    assert agent._exit_code(tmp_path, None, 1, stopped=True) == agent.FAILED


@pytest.mark.parametrize(
    ("state", "code", "retry", "refused"),
    [
        ("failed", 2, True, True),
        ("failed", 3, True, True),
        ("preempted", 75, True, True),
        ("failed", 1, False, True),
        ("failed", 1, True, False),
        ("running", 1, True, False),
    ],
)
def test_what_a_restarted_group_does_not_train_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, code: int, retry: bool, refused: bool
) -> None:
    agent.write_status(tmp_path, state, code, "why", retry=retry)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert (agent.restart_refused(tmp_path) is not None) == refused
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert agent.restart_refused(tmp_path) is None, "a new start by a person goes on"


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
