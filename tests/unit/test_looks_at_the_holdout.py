"""Who may read the holdout: nobody who searches, and nobody whose look would not be counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist import cli
from sftdist.core.config import compose, write_config
from sftdist.core.settings import EvaluateConfig
from sftdist.evaluate import look_issues


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_config(Path("runs/r"), compose("quickstart", ["run.dir=runs/r"]))
    return "run.dir=runs/r"


@pytest.mark.parametrize("words", [["evaluate", "split=holdout"], ["publish", "name=bot"]])
def test_a_sweep_may_not(words: list[str], run: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *more = words
    assert cli.main([command, run, *more, "-m", "evals.max_prompts=10,20"]) == 2
    assert "-m: a sweep may not read the holdout" in capsys.readouterr().err
    assert not list(Path().rglob("holdout-looks.jsonl"))


def test_the_looks_are_counted_where_the_run_has_its_data(run: str) -> None:
    def issues(*words: str) -> list[str]:
        return look_issues(compose(None, [run, *words], EvaluateConfig))

    assert issues("split=holdout") == []
    assert issues("split=holdout", f"data.store_dir={Path('stores').resolve()}") == []
    assert issues("data.store_dir=other") == [], "of the validation split nobody keeps count"
    (found,) = issues("split=holdout", "data.store_dir=other")
    assert found.startswith("data.store_dir: given other with split=holdout")
