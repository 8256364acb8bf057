"""The locked holdout and the data manifest as a user meets them: commands, exit codes, files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftdist.core import config
from sftdist.core.settings import PrepareConfig, TrainJobConfig
from sftdist.core.storage import read_json
from sftdist.data.store import SPLITS, TokenStore
from sftdist.data.vocabulary import train_tokenizer
from sftdist.prepare import command
from sftdist.train import start

Rows = list[dict[str, Any]]
ROWS: Rows = [{"id": f"r{i}", "prompt": f"question {i}", "completion": f"answer {i}"} for i in range(60)]
LOCK = "data.holdout_lock=conf/holdout.json"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"question {i} answer {i} system user assistant" for i in range(200)], 320).save_pretrained(folder)
    return folder


class Desk:
    """A folder with data, and the two commands in it; what they say is read from the screen."""

    def __init__(self, folder: Path, tokenizer: Path, screen: pytest.CaptureFixture[str]) -> None:
        self.folder, self.screen = folder, screen
        # Of a model there is no more than its tokenizer: whoever tried to load it would fail otherwise.
        self.base = ["+exp=full", f"model.path={tokenizer}", "model.chat_template=chatml", "data.holdout_fraction=0.2"]

    def write(self, rows: Rows, name: str = "train.jsonl") -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_two(self, rows: Rows) -> None:
        self.write(rows[:20], "a.jsonl")
        self.write(rows[20:], "b.jsonl")

    def prepare(self, *words: str, data: str = "data.train=train.jsonl") -> tuple[int, str, str]:
        code = config.main(PrepareConfig, command, "prepare", [*self.base, data, *words])
        said = self.screen.readouterr()
        return code, said.out, said.err

    def train(self, *words: str) -> tuple[int, str]:
        code = config.main(TrainJobConfig, start, "train", [*self.base, "data.train=train.jsonl", *words])
        return code, self.screen.readouterr().err

    def splits(self) -> dict[str, str]:
        """The split of every row of the last prepare, by id."""
        manifest = read_json(self.folder / "stores" / "data-manifest.json")
        stores = [TokenStore.open(self.folder / "stores" / entry["store"]) for entry in manifest["sources"].values()]
        return {
            i: SPLITS[s] for store in stores for i, s in zip(store.row_ids(range(len(store))), store.split, strict=True)
        }


@pytest.fixture
def desk(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Desk:
    monkeypatch.chdir(tmp_path)
    found = Desk(tmp_path, tokenizer_folder, capsys)
    found.write(ROWS)
    return found


def test_a_holdout_from_the_first_lock_to_a_withdrawn_row(desk: Desk) -> None:
    code, _, said = desk.prepare(LOCK)
    assert (code, "lock=write makes the first one" in said) == (3, True)
    assert desk.prepare(LOCK, "lock=write", "dry_run=true")[0] == 0
    assert not (desk.folder / "conf").exists(), "a dry run writes nothing"
    assert not (desk.folder / "stores" / "data-manifest.json").exists(), "nor does a prepare that was refused"
    code, said, _ = desk.prepare(LOCK, "lock=write")
    assert code == 0
    assert "the holdout is locked" in said
    held = [i for i, split in desk.splits().items() if split == "holdout"]
    holdout = {"rows": len(held), "locked": True, "version": 1}
    assert read_json(desk.folder / "stores" / "data-manifest.json")["holdout"] == holdout
    assert read_json(desk.folder / "stores" / "report.json")["holdout"] == holdout

    desk.write([*reversed(ROWS), {"prompt": "one for training", "completion": "x"}])
    assert desk.prepare(LOCK)[0] == 0
    fewer = [row for row in ROWS if row["id"] != held[0]]
    desk.write(fewer)
    code, _, said = desk.prepare(LOCK)
    assert code == 3
    assert f"removed: 1 row in the lock, but not in the data: train {held[0]}" in said
    assert desk.prepare(LOCK, "lock=extend")[0] == 3
    code, said, _ = desk.prepare(LOCK, "lock=withdraw")
    assert (code, f"1 row withdrawn: train {held[0]}" in said) == (0, True)
    desk.write([*fewer, *({"id": f"n{i}", "prompt": f"new {i}", "completion": "x"} for i in range(30))])
    assert desk.prepare(LOCK)[0] == 3
    assert desk.prepare(LOCK, "lock=extend")[0] == 0
    assert desk.prepare(LOCK)[0] == 0
    text = (desk.folder / "conf" / "holdout.json").read_text()
    assert read_json(desk.folder / "conf" / "holdout.json")["version"] == 3
    assert "question" not in text
    assert "answer" not in text


def test_train_is_refused_before_there_is_a_model(desk: Desk) -> None:
    """The folder has a tokenizer and no weights: whatever came after the data would say so."""
    assert desk.prepare(LOCK, "lock=write")[0] == 0
    held = next(i for i, split in desk.splits().items() if split == "holdout")
    desk.write([row for row in ROWS if row["id"] != held])
    code, said = desk.train(LOCK)
    assert code == 3
    assert f"removed: 1 row in the lock, but not in the data: train {held}" in said
    code, said = desk.train("data.holdout_lock=conf/nowhere.json")
    assert (code, "conf/nowhere.json, which does not exist" in said) == (3, True)


def test_holdout_files_of_ones_own_are_locked_the_same_way(desk: Desk) -> None:
    desk.write(ROWS[:40])
    desk.write(ROWS[40:50], "h.jsonl")
    desk.write(ROWS[50:], "v.jsonl")
    own = ["data.holdout=h.jsonl", "data.val=v.jsonl", LOCK]
    assert desk.prepare(*own, "lock=write")[0] == 0
    assert set(read_json(desk.folder / "conf" / "holdout.json")["rows"]) == {"holdout"}
    desk.write(ROWS[50:55], "v.jsonl")  # validation is not locked
    desk.write(ROWS[40:50][::-1], "h.jsonl")
    assert desk.prepare(*own)[0] == 0
    desk.write([*ROWS[41:50], {**ROWS[40], "completion": "corrected"}], "h.jsonl")
    code, _, said = desk.prepare(*own)
    assert (code, "changed: 1 row in the lock with another text: holdout r40" in said) == (3, True)
    code, _, said = desk.prepare("data.val=v.jsonl", LOCK)
    assert (code, "data.holdout was a file when it was locked, now not set" in said) == (3, True)


SHUFFLED = random.Random(3).sample(ROWS, len(ROWS))
ARRANGEMENTS: dict[str, tuple[Callable[[Desk], None], str]] = {
    "reordered": (lambda desk: desk.write(SHUFFLED), "data.train=train.jsonl"),
    "added to": (
        lambda desk: desk.write([*({"id": f"x{i}", "prompt": f"x {i}", "completion": "y"} for i in range(40)), *ROWS]),
        "data.train=train.jsonl",
    ),
    "fewer": (lambda desk: desk.write(ROWS[::3]), "data.train=train.jsonl"),
    "two files": (lambda desk: desk.write_two(SHUFFLED), "data.train=[b.jsonl,a.jsonl]"),
    "two sources": (lambda desk: desk.write_two(SHUFFLED), "data.sources={one:{path:a.jsonl},two:{path:b.jsonl}}"),
    "another shape and other answers": (
        lambda desk: desk.write([{"id": r["id"], "instruction": f" {r['prompt']}\n", "output": "z"} for r in ROWS]),
        "data.train=train.jsonl",
    ),
}


def test_a_row_keeps_its_split_however_the_data_is_arranged(desk: Desk) -> None:
    assert desk.prepare("data.val_fraction=0.2")[0] == 0
    before = desk.splits()
    assert set(before.values()) == {"train", "validation", "holdout"}
    for name, (arrange, words) in ARRANGEMENTS.items():
        arrange(desk)
        assert desk.prepare("data.val_fraction=0.2", data=words)[0] == 0, name
        after = desk.splits()
        same = before.keys() & after.keys()
        assert len(same) >= 20
        assert {i: after[i] for i in same} == {i: before[i] for i in same}, name


def test_two_manifests_are_compared(desk: Desk) -> None:
    source = "data.sources={a:{path:train.jsonl,licence:MIT,origin:the desk,label_origin:human}}"
    assert desk.prepare(data=source)[0] == 0
    manifest = desk.folder / "stores" / "data-manifest.json"
    entry = read_json(manifest)["sources"]["a"]
    assert (entry["licence"], entry["origin"], entry["made_of"]["labels"]) == ("MIT", "the desk", [2, "human"])
    assert entry["splits"]["train"]["rows"] + entry["splits"]["holdout"]["rows"] <= 60
    assert entry["stages"]["read"]["rows"] == 60
    assert entry["coverage"] == {"tags": {}, "origins": {"human": entry["splits"]["train"]["rows"]}}
    assert (entry["contract"], entry["guideline"]) == (None, None)
    train = [i for i, split in desk.splits().items() if split == "train"]
    gone, edited, *_ = train
    rows = [{**row, "completion": "edited"} if row["id"] == edited else row for row in ROWS if row["id"] != gone]
    desk.write([*rows, {"id": "n", "prompt": "new", "completion": "x"}, rows[0]])
    # The manifest that is compared with is the one that this very command replaces.
    code, said, _ = desk.prepare(f"diff={manifest}", data=source.replace("MIT", "CC0"))
    assert code == 0
    lines = said.partition("compared with ")[2].splitlines()
    assert lines[1:5] == [
        "a: input, licence changed",
        "a: 1 added: n",
        f"a: 1 dropped: {gone} (1 gone)",
        f"a: 1 changed (same id, another text): {edited}",
    ]
    assert "100.0% -> 100.0%" in said
    # Elsewhere, as it was committed: its stores are looked for in the present folder, too.
    kept = desk.folder / "kept.json"
    kept.write_bytes(manifest.read_bytes())
    assert "the rows are the same" in desk.prepare("diff=kept.json", data=source)[1]
    assert "re-split holdout -> train" in desk.prepare("diff=kept.json", "data.holdout_fraction=0.1", data=source)[1]
    desk.write([ROWS[3]], "h.jsonl")
    code, said, _ = desk.prepare("diff=kept.json", "data.holdout=h.jsonl", "data.leaks=drop", data=source)
    assert (code, "a: 1 re-split train -> leaked: r3" in said) == (0, True)
    other = "data.store_dir=elsewhere"  # with a store of another key: the earlier one is nowhere to be found
    code, said, _ = desk.prepare("diff=kept.json", other, "data.holdout_fraction=0.3", data=source)
    assert (code, "a: its rows cannot be compared, only their counts: its store a-" in said) == (0, True)
    code, _, said = desk.prepare("diff=nowhere.json", "data.store_dir=never", data=source)
    assert (code, "diff=nowhere.json: given a file that cannot be read" in said) == (3, True)
    assert not (desk.folder / "never").exists(), "found before anything is prepared"
