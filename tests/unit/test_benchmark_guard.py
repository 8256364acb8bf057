"""The guard of `benchmarks/run.py`: what counts as a fall, what it is compared with, and the second try for noise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine, run
from benchmarks.guard import compare, last_committed, table
from benchmarks.machine import Result

BEFORE = {"step: ours / TRL": 4.0, "step: share of products": 0.5, "packing: fill": 0.999}


def git(repository: Path, *words: str) -> None:
    names = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    subprocess.run(["git", "-C", str(repository), *names, *words], check=True, capture_output=True)


def written(repository: Path, ratios: dict[str, float]) -> Path:
    """A result as `benchmarks.run` writes it."""
    where = {"versions": {}, "processor": "a", "cores": 2, "gpus": []}
    result = Result("run", "python -m benchmarks.run", {"ratios": ratios}, [], where=where)
    return result.save(repository / "benchmarks" / "results")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with a committed run."""
    git(tmp_path, "init", "-q")
    written(tmp_path, BEFORE)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a run")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(Result.save, "__defaults__", (tmp_path / "benchmarks" / "results",))
    return tmp_path


@pytest.mark.parametrize(("factor", "fallen"), [(0.89, True), (0.91, False), (1.0, False), (1.5, False), (0.0, True)])
def test_a_fall_of_more_than_a_tenth_is_named(factor: float, fallen: bool) -> None:
    verdict = compare({**BEFORE, "step: ours / TRL": 4.0 * factor}, BEFORE)
    assert verdict.passed is not fallen
    assert list(verdict.fallen) == ["step: ours / TRL"] * fallen
    assert any("FALLEN step: ours / TRL" in line for line in verdict.lines()) is fallen


def test_what_is_no_number_has_fallen() -> None:
    assert list(compare({**BEFORE, "packing: fill": math.nan}, BEFORE).fallen) == ["packing: fill"]


def test_a_missing_ratio_is_a_fault_and_a_new_one_is_not() -> None:
    now = {name: value for name, value in BEFORE.items() if name != "packing: fill"}
    missing = compare(now, BEFORE)
    assert not missing.passed
    assert missing.lines() == ["MISSING packing: fill: the earlier run has it"]
    new = compare({**BEFORE, "start: imports": 0.5}, BEFORE)
    assert new.passed
    assert new.lines() == ["new start: imports: nothing to compare it with"]
    assert [row["change"] for row in table(now, BEFORE)] == ["", "+0.0%", "+0.0%"]


def test_the_last_run_is_what_git_has_and_not_what_lies_in_the_folder(repository: Path) -> None:
    file = written(repository, {"step: ours / TRL": 1.0})  # of the same day: the same file
    assert json.loads(file.read_text())["figures"]["ratios"] == {"step: ours / TRL": 1.0}
    found = last_committed(repository, "benchmarks/results", "run")
    assert found is not None
    assert found[0] == f"benchmarks/results/{file.name}"
    assert found[1]["figures"]["ratios"] == BEFORE
    assert last_committed(repository, "benchmarks/results", "other") is None
    assert last_committed(repository / "benchmarks" / "results", "nowhere", "run") is None


def whole_run(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[float]], words: list[str]) -> int:
    """`python -m benchmarks.run` where each part answers its next number; the exit code."""
    parts = {part: lambda rounds, part=part: {"it": answers[part].pop(0)} for part in answers}
    monkeypatch.setattr(run, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["benchmarks.run", *words])
    return run.main()


def committed(repository: Path, ratios: dict[str, float]) -> None:
    written(repository, ratios)
    git(repository, "commit", "-qam", "another run")


def test_a_fall_must_happen_twice(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(repository, {"step: it": 4.0, "start: it": 0.5})
    assert whole_run(monkeypatch, {"step": [3.0, 3.9], "start": [0.5]}, []) == 0
    assert whole_run(monkeypatch, {"step": [4.1], "start": [0.4, 0.44]}, []) == 1
    assert "FALLEN start: it: by 12.0% (allowed: 10%)" in capsys.readouterr().out
    (file,) = (repository / "benchmarks" / "results").glob("*-run.json")
    figures = json.loads(file.read_text())["figures"]
    assert figures["ratios"] == {"step: it": 4.1, "start: it": 0.44}
    assert figures["passed"] is False


def test_some_parts_alone_are_compared_with_theirs_and_kept_beside(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(repository, {"step: it": 4.0, "start: it": 0.5})
    answers = {"step": [4.0], "start": [0.5]}
    assert whole_run(monkeypatch, answers, ["--only", "step"]) == 0  # `start: it` is not missing
    assert list((repository / "benchmarks" / "results").glob("*-run-part.json"))
    found = last_committed(repository, "benchmarks/results", "run")
    assert found is not None
    assert found[1]["figures"]["ratios"] == {"step: it": 4.0, "start: it": 0.5}


def test_the_first_run_of_all_has_nothing_to_fall_from(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "ROOT", repository / "benchmarks" / "nowhere")
    assert whole_run(monkeypatch, {"step": [1.0]}, []) == 0
    assert "new step: it" in capsys.readouterr().out
