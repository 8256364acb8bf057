from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftdist.core.distributed import session
from sftdist.core.errors import CheckpointError, ConfigError, StartupError, TrainingError
from sftdist.core.failure import FILE, Failure, failure_of, here, lines, print_failure, read_failure, write_failure
from sftdist.core.progress import Activity

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


def fail_alone(reports: list[Failure]) -> None:
    with session(device=torch.device("cpu"), report=reports.append) as world:
        world.progress.begin_step(3, ["a"])
        raise ValueError("bad")


def test_one_process_reports_too() -> None:
    reports: list[Failure] = []
    with pytest.raises(ValueError, match="bad"):
        fail_alone(reports)
    assert [(one.rank, one.kind, one.step, one.rows) for one in reports] == [(0, "error", 3, ("a",))]
