"""When a watched run is over: it may be between two starts, on another host, or gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftdist.core import agent
from sftdist.core.settings import LaunchSettings
from sftdist.watch import RunEnd

LAUNCH = LaunchSettings(lost_seconds=60.0, hang_seconds=1800.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def end(tmp_path: Path, clock: Clock) -> RunEnd:
    return RunEnd(tmp_path, LAUNCH, clock)


def over_at(end: RunEnd, clock: Clock, seconds: float) -> bool:
    clock.now = seconds
    return end.is_over()


def test_one_that_is_done_is_over_at_once(tmp_path: Path, end: RunEnd) -> None:
    agent.write_status(tmp_path, "done", 0)
    assert end.is_over()
    assert (end.code, end.reason) == (0, "")


@pytest.mark.parametrize(
    ("state", "code", "seconds", "said"),
    [
        ("failed", 3, 60, "the run has failed at step 7: no space"),
        ("preempted", 75, 1800, "the run was preempted, and did not go on at step 7: no space"),
        ("running", 75, 1800, "its process is gone, and nothing has changed for 1800 s"),
    ],
)
def test_another_has_time_to_be_started_again(
    tmp_path: Path, end: RunEnd, clock: Clock, state: str, code: int, seconds: float, said: str
) -> None:
    agent.write_status(tmp_path, state, code, "no space\nadvice", step=7)
    assert not over_at(end, clock, 0)
    assert not over_at(end, clock, seconds - 1)
    assert over_at(end, clock, seconds)
    assert end.reason == f"{tmp_path}: {said}"
    assert end.code == (1 if state == "running" else code)


def test_one_that_goes_on_is_not_over(tmp_path: Path, end: RunEnd, clock: Clock) -> None:
    """Also where its lock cannot be seen from here: then it is seen by what it writes."""
    agent.write_status(tmp_path, "failed", 1)
    assert not over_at(end, clock, 0)
    agent.write_status(tmp_path, "running", 1)
    assert not over_at(end, clock, 1700)
    metrics = tmp_path / "metrics.jsonl"
    for number in range(1, 4):
        metrics.touch()
        os.utime(metrics, (number, number))
        assert not over_at(end, clock, 1700 * (number + 1))
    assert over_at(end, clock, 1700 * 4 + 1800)


def test_one_whose_directory_is_held_is_not_over(tmp_path: Path, end: RunEnd, clock: Clock) -> None:
    agent.write_status(tmp_path, "failed", 1)
    code = f"from pathlib import Path\nfrom sftdist.core.lock import RunLock\nwith RunLock(Path({str(tmp_path)!r})): "
    held = [sys.executable, "-c", code + "print(flush=True); input()"]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert not over_at(end, clock, 0)
        assert not over_at(end, clock, 10_000)
        other.communicate(b"\n")
    assert not over_at(end, clock, 10_001), "it may be about to start again"
    assert over_at(end, clock, 10_061)


def test_one_that_never_began_is_gone(end: RunEnd, clock: Clock) -> None:
    assert not over_at(end, clock, 0)
    assert over_at(end, clock, 1800)
    assert end.code == agent.FAILED
