"""`inspect run.dir=R worst=N`: the rows that a trained checkpoint finds hardest, noisy labels first (A27)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftdist.commands.inspect import run
from sftdist.core.config import compose
from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.settings import InspectConfig
from sftdist.data.loader import Document, pack_documents
from sftdist.data.store import TokenStore
from sftdist.model.loss import LossModel
from sftdist.train import run as train
from tests.e2e.workshop import SMALL, model_folder
from tests.pages import foreign_parts

NOISY = {7: "Zebras quack at noon.", 40: "x9 Q!! vv~", 63: "Maybe tomorrow, who knows?"}
WORDS = ("model.path=model", "data.train=my.jsonl", *SMALL, "optimizer.lr=1e-2", "data.val_fraction=0")


def chat(number: int) -> dict[str, Any]:
    answer = NOISY.get(number, "It is open from nine to five.")
    said = [{"role": "user", "content": f"Is shop {number} open?"}, {"role": "assistant", "content": answer}]
    return {"id": f"row-{number}", "messages": said}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs over rows of which three have a noisy label: `full` and `lora`."""
    folder = tmp_path_factory.mktemp("worst")
    model_folder(folder / "model")
    (folder / "my.jsonl").write_text("".join(json.dumps(chat(number)) + "\n" for number in range(80)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("full", "lora"):
            words = [
                *WORDS,
                f"run.dir={name}",
                "train.max_steps=30",
                "checkpoint.every_steps=4",
                "checkpoint.keep_last=9",
            ]
            more = ["tune.target=all-linear", "tune.r=8", "optimizer.lr=3e-2"] if name == "lora" else []
            train(compose(name, [*words, *more], complete=True))
    return folder


@pytest.fixture
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def worst(*words: str) -> list[dict[str, Any]]:
    run(compose(None, [*words, "output=jsonl", "file=out.jsonl"], InspectConfig, complete=True))
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("name", ["full", "lora"])
def test_noisy_labels_come_first_with_their_worst_tokens(name: str) -> None:
    found = worst(f"run.dir={name}", "worst=5")
    assert {line["id"] for line in found[:3]} == {f"train/row-{number}" for number in NOISY}
    assert [line["place"] for line in found] == [1, 2, 3, 4, 5]
    losses = [line["loss"] for line in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] > 2 * losses[3], "the clean rows are far below"
    for line in found[:3]:
        answer = line["supervised_text"][0]
        for token in line["worst_tokens"]:
            assert line["tokens"][token["place"]]["supervised"]
            assert token["text"] in answer
            assert token["loss"] >= line["loss"]


def test_the_loss_is_that_of_the_exported_model(inside: Path) -> None:
    """Against the export, one row a forward, straight from the definition."""
    first = worst("run.dir=full", "worst=80")[-1]
    model = AutoModelForCausalLM.from_pretrained(inside / "full/export", dtype=torch.bfloat16)
    store = TokenStore.open(next((inside / "stores").glob("train-*")))
    row = [f"train/{name}" for name in store.row_ids(range(len(store.lengths)))].index(first["id"])
    batch = pack_documents([Document(*store.tokens(row), 0, "row")])
    with torch.inference_mode():
        output = LossModel(model, 1).eval()(**batch.inputs())
    assert first["loss"] == pytest.approx(float(output.per_source[0] / output.counts[0]), rel=2e-2)


@pytest.mark.usefixtures("inside")
def test_an_earlier_checkpoint_and_fewer_rows() -> None:
    early, late = worst("run.dir=full", "worst=80", "step=4"), worst("run.dir=full", "worst=80")
    assert len(early) == len(late) == 79  # one of 80 rows is held out, by the hash of its prompt
    clean = {line["id"]: line["loss"] for line in late if int(line["id"].rpartition("-")[2]) not in NOISY}
    assert sum(line["loss"] for line in early if line["id"] in clean) > 1.1 * sum(clean.values()), (
        "four steps teach less than thirteen"
    )
    assert len(worst("run.dir=full", "worst=80", "limit=10")) == 10


def test_the_page_shows_loss_and_tokens(inside: Path) -> None:
    run(compose(None, ["run.dir=full", "worst=3", "output=html", "file=out.html"], InspectConfig, complete=True))
    page = (inside / "out.html").read_text(encoding="utf-8")
    assert page.count("worst tokens:") == 3
    assert page.count("<small>loss ") == 3
    assert foreign_parts(page) == []


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["worst=3", "+exp=full", *WORDS], ConfigError, "run.dir: given "),
        (["run.dir=full", "worst=0"], ConfigError, "worst: given 0, required 1 or more"),
        (["run.dir=full", "worst=3", "step=5"], CheckpointError, "4, 8, 12, 13"),
        (["run.dir=full", "step=best"], ConfigError, "required the number of a step"),
        (["run.dir=full", "worst=3", "step=first"], ConfigError, "required latest, best, the number of a step"),
    ],
)
def test_what_cannot_be_shown_is_told(words: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        worst(*words)


def test_a_damaged_checkpoint_is_refused(inside: Path) -> None:
    [weights, *_] = sorted((inside / "lora/checkpoints/step-00000008").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not verify"):
        worst("run.dir=lora", "worst=3", "step=8")
    weights.write_bytes(whole)
