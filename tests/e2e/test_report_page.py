"""`prepare` leaves the report as a page, of data that it accepts and of data that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftdist import prepare
from sftdist.core.config import compose
from sftdist.core.errors import DataError
from sftdist.core.settings import PrepareConfig
from tests.e2e.workshop import model_folder, write_rows
from tests.pages import foreign_parts

WORDS = ("model.path=model", "data.train=my.jsonl", "data.workers=1", "data.max_len=128", "train.packs_per_step=2")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "my.jsonl", 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_of_data_that_is_accepted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = prepare.run(compose(None, [*WORDS, "train.epochs=2"], PrepareConfig))
    page = made.page.read_text(encoding="utf-8")
    assert made.page == Path("stores/report.html")
    assert foreign_parts(page) == []
    assert str(made.page) in capsys.readouterr().out
    report = json.loads(made.report_file.read_text(encoding="utf-8"))
    assert report == made.report
    source = report["sources"]["train"]
    stages = {name: stage["rows"] for name, stage in source["stages"].items()}
    left = sum(rows for name, rows in stages.items() if name not in ("read", "kept", "train", "validation", "holdout"))
    assert stages["read"] - left == stages["train"] + stages["validation"] + stages["holdout"]
    assert sum(source["lengths"]["rows"]) == stages["train"]
    plan = report["training"]["plan"]
    assert (plan["epochs"], plan["repeats"]) == (1.0, 2.0)
    assert report["training"]["over"]["train"]["rows"] == sum(
        rows for first, rows in zip(source["lengths"]["from"], source["lengths"]["rows"], strict=True) if first > 128
    )
    assert "Packs and mixture as configured" in page


def test_the_page_of_data_that_is_refused_says_why(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (home / "my.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "</script><b>alone</b>"}]}\n')
    with pytest.raises(DataError, match="no assistant turn"):
        prepare.run(compose(None, [*WORDS], PrepareConfig))
    page = Path("stores/report.html").read_text(encoding="utf-8")
    assert foreign_parts(page) == []
    assert "prepare refuses this data" in page
    assert "my.jsonl:61" in page
    assert "stores/report.html" in capsys.readouterr().out


def test_a_plan_that_cannot_be_made_is_told_and_prepare_goes_on(home: Path) -> None:
    made = prepare.run(compose(None, [*WORDS, "data.max_len=64", "data.overlong=error"], PrepareConfig))
    assert "data.overlong=error" in made.report["training"]["not_computed"]
    assert made.report["verdict"]["level"] == "unfit"
    assert "Not computed: " in made.page.read_text(encoding="utf-8")
