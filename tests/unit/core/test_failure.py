from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftdist.core.distributed import session
from sftdist.core.errors import CheckpointError, ConfigError, StartupError, TrainingError
from sftdist.core.failure import FILE, Failure, failure_of, here, lines, print_failure, read_failure, write_failure
from sftdist.core.progress import Activity
from sftdist.core.ranklog import log_file
from tests.conftest import ROOT

DOING = Activity("forward and backward", 7, tuple(f"row-{number}" for number in range(12)))


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_file_holds_all_of_it_and_is_replaced(tmp_path: Path) -> None:
    assert read_failure(tmp_path) is None
    failure = failure_of(raised(ValueError("bad")), 2, DOING)
    write_failure(tmp_path, replace(failure, rank=1))
    write_failure(tmp_path, failure)
    assert read_failure(tmp_path) == failure
    assert [path.name for path in (tmp_path / "log").iterdir()] == [FILE.name]


def test_a_fault_of_ours_is_shown_with_its_traceback(tmp_path: Path) -> None:
    failure = failure_of(raised(ValueError("bad")), 2, DOING)
    said = lines(failure, tmp_path)
    assert said[0].startswith(f"sftdist: error: rank 2 on {failure.host} (process {failure.pid}) failed in step 7, ")
    assert said[0].endswith("forward and backward: ValueError: bad")
    assert "raise error" in "\n".join(said)
    assert said[-2] == "rows of that step: " + ", ".join(DOING.rows[:10]) + " and 2 more"
    assert said[-1] == f"all of it is in {tmp_path / 'log' / 'failure.json'}"


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (ConfigError("say x"), 2, True),
        (TrainingError("say x"), 1, False),
        (StartupError("say x"), 1, False),
        (CheckpointError("say x"), 1, True),
    ],
)
def test_an_error_that_says_what_to_change_keeps_its_traceback_in_the_file(
    error: Exception, code: int, retry: bool
) -> None:
    failure = failure_of(raised(error), 0, Activity())
    assert (failure.message, failure.code, failure.retry) == ("say x", code, retry)
    assert "raise error" in failure.traceback
    assert len(lines(failure)) == 1
    assert " while starting: say x" in lines(failure)[0]


@pytest.mark.parametrize(("kind", "word"), [("killed", "died"), ("lost", "was lost"), ("stalled", "stands still")])
def test_what_happened_to_others(kind: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    stack = "Main thread\n  at x\n" if kind == "stalled" else ""
    print_failure(replace(here(kind, 3, DOING, "why"), host="node-b", pid=4, traceback=stack))
    said = capsys.readouterr().err
    assert said.startswith(
        f"sftdist: error: rank 3 on node-b (process 4) {word} in step 7, forward and backward: why\n"
    )
    assert ("at x" in said) == bool(stack)


def test_one_process_alone_says_what_to_change_and_no_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for error, doing, said in (
        (ConfigError(["say x"]), Activity(phase="evaluating"), "sftdist: error: say x\n"),
        (ConfigError(["say x"]), DOING, "failed in step 7, forward and backward: say x"),
        (ValueError("say x"), Activity(), "failed while starting: ValueError: say x"),
    ):
        print_failure(failure_of(raised(error), 0, doing))
        assert said in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    print_failure(failure_of(raised(ConfigError(["say x"])), 0, Activity()))
    assert "rank 0 on" in capsys.readouterr().err


def fail_alone(reports: list[Failure]) -> None:
    with session(device=torch.device("cpu"), report=reports.append) as world:
        world.progress.begin_step(3, ["a"])
        raise ValueError("bad")


def test_one_process_reports_too() -> None:
    reports: list[Failure] = []
    with pytest.raises(ValueError, match="bad"):
        fail_alone(reports)
    assert [(one.rank, one.kind, one.step, one.rows) for one in reports] == [(0, "error", 3, ("a",))]


REPORTS = """
import sys
from pathlib import Path
from sftdist.core import agent
from sftdist.core.failure import here
from sftdist.core.progress import Activity
from sftdist.core.ranklog import rank_log
kind, run_dir = sys.argv[1], Path(sys.argv[2])
with rank_log(run_dir, 1):
    agent.report(run_dir, here(kind, 1, Activity(), "the cause"))
"""
OUR_LAST = {"SFTDIST_START": "s", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "1"}


@pytest.mark.parametrize(
    ("kind", "variables", "at_once"),
    [
        ("error", OUR_LAST, False),
        pytest.param("killed", OUR_LAST, False, marks=pytest.mark.long),
        ("lost", OUR_LAST, True),  # its ranks may take a while to end
        # The agent says nothing: it starts them again.
        pytest.param("error", {**OUR_LAST, "TORCHELASTIC_RESTART_COUNT": "0"}, True, marks=pytest.mark.long),
        pytest.param("error", {}, True, marks=pytest.mark.long),  # a torchrun that is not ours
    ],
)
def test_a_rank_tells_the_console_what_its_agent_will_not(
    tmp_path: Path, kind: str, variables: dict[str, str], at_once: bool
) -> None:
    said = reported(tmp_path, kind, variables)
    assert said.count("the cause") == at_once
    assert log_file(tmp_path, 1).read_text().count("the cause") == 1
    left = read_failure(tmp_path)
    assert left is not None
    assert left.message == "the cause"


def test_a_failure_that_cannot_be_written_down_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir(parents=True)  # in the way of the file
    said = reported(tmp_path, "error", OUR_LAST).splitlines()
    assert said[0].endswith("the cause")
    assert "the failure could not be written down" in said[-1]


def reported(run_dir: Path, kind: str, variables: dict[str, str]) -> str:
    """What rank 1 puts on the console for a failure of this kind."""
    here = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1", **variables}
    command = [sys.executable, "-c", REPORTS, kind, str(run_dir)]
    return subprocess.run(command, env=here, capture_output=True, text=True, check=True).stderr
