"""`inspect step=N`: the documents of a step of a run, from its plan alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftdist.commands.inspect import run
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError, DataError
from sftdist.core.settings import InspectConfig
from tests.e2e.workshop import SMALL, model_folder, rows, sftdist, write_rows
from tests.pages import foreign_parts

WORDS = (
    "model.path=model",
    "data.train=my.jsonl",
    *SMALL,
    "train.max_steps=3",
    "train.pack_tokens=256",
    "zero.stage=1",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a tiny model and its data are."""
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "my.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inspected(*words: str) -> list[dict[str, Any]]:
    run(compose(None, [*words, "output=jsonl", "file=out.jsonl"], InspectConfig))
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_packs_of_a_step_with_the_borders_of_their_documents(home: Path) -> None:
    found = inspected(*WORDS, "step=2")
    packs: dict[int, list[dict[str, Any]]] = {}
    for line in found:
        packs.setdefault(line["pack"]["number"], []).append(line)
    assert sorted(packs) == [0, 1, 2, 3]
    texts = {f"train/{row['id']}": row["messages"] for row in rows(120)}
    for lines in packs.values():
        reached = 0
        for line in lines:
            assert line["pack"]["start"] == reached
            reached += len(line["tokens"])
            assert all(message["content"].rstrip() in line["text"] for message in texts[line["id"]])
        assert lines[0]["pack"]["tokens"] == reached <= lines[0]["pack"]["pack_tokens"] == 256
        assert lines[0]["pack"]["documents"] == len(lines)
    others = inspected(*WORDS, "step=1")
    assert [line["id"] for line in found] != [line["id"] for line in others]
    run(compose(None, [*WORDS, "step=2", "output=html", "file=out.html"], InspectConfig))
    page = (home / "out.html").read_text(encoding="utf-8")
    assert page.count('class="pack"') == 4
    assert foreign_parts(page) == []


@pytest.mark.parametrize("step", [0, 4])
def test_a_step_that_there_is_not(home: Path, step: int) -> None:
    with pytest.raises(ConfigError, match=rf"step={step}: there is no such step, required 1 to 3"):
        inspected(*WORDS, f"step={step}")


def test_other_rows_than_the_run_has_noted_are_refused(home: Path) -> None:
    found = inspected(*WORDS, "step=2", "run.dir=run")
    (home / "run" / "log").mkdir(parents=True)
    noted = home / "run" / "log" / "rows.jsonl"
    ids = [line["id"] for line in found]
    noted.write_text(json.dumps({"step": 2, "rows": ids}) + "\n", encoding="utf-8")
    assert inspected(*WORDS, "step=2", "run.dir=run") == found
    noted.write_text(json.dumps({"step": 2, "rows": ids[::-1]}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="trained on other rows"):
        inspected(*WORDS, "step=2", "run.dir=run")


@pytest.mark.long
def test_weights_are_those_of_the_loss(home: Path) -> None:
    write_rows(home / "other.jsonl", 40)
    sources = ["data.sources.a.path=my.jsonl", "data.sources.a.lam=0.5", "data.sources.b.path=other.jsonl"]
    words = [word for word in WORDS if not word.startswith("data.train")]
    found = inspected(*words, *sources, "data.sources.b.lam=0.5", "data.mix_mode=loss", "step=1")
    weights = {
        source: {t["weight"] for line in found if line["id"].startswith(source) for t in line["tokens"]} - {0.0}
        for source in ("a/", "b/")
    }
    assert [len(found) for found in weights.values()] == [1, 1]
    assert max(weights["a/"]) < 1 < max(weights["b/"])  # a is the larger one


@pytest.mark.long
def test_a_step_of_a_real_run_with_nothing_but_its_directory(home: Path) -> None:
    done = sftdist(["train", *WORDS, "run.dir=run", "launch.nproc=1", "data.expand_turns=true"], home)
    assert done.returncode == 0, done.stderr
    noted = [json.loads(line) for line in (home / "run" / "log" / "rows.jsonl").read_text().splitlines()]
    assert [line["step"] for line in noted] == [1, 2, 3]
    for line in noted:
        assert [document["id"] for document in inspected("run.dir=run", f"step={line['step']}")] == line["rows"]
