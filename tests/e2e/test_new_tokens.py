"""`model.add_tokens` through the whole program: rows that begin as the mean, train, are saved, exported and asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftdist.commands import chat
from sftdist.commands.export import run as export
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.settings import ExportConfig
from sftdist.model.lora import load_adapter
from sftdist.train import run
from tests.e2e.workshop import SMALL, model_folder, write_rows

pytestmark = pytest.mark.timeout(600)

TOKENS = ("colour", "<thing>")
KEYS = (
    *("model.path=model", "data.train=my.jsonl", *SMALL, 'model.add_tokens=[colour,"<thing>"]'),
    *("precision=fp32", "export.dtype=fp32", "zero.stage=1", "optimizer.weight_decay=0.0"),
)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a folder with a model, `padding` rows more than tokens, and data that holds the new tokens."""

    def make(padding: int = 0) -> Path:
        model_folder(tmp_path / "model", padding=padding)
        data = write_rows(tmp_path / "my.jsonl", 60)
        data.write_text(data.read_text().replace("is thing", "is <thing>"))
        return tmp_path

    monkeypatch.chdir(tmp_path)
    return make


def train(exp: str, *keys: str) -> None:
    run(compose(exp, [*KEYS, *keys]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_full_fine_tune_trains_their_rows_and_the_export_knows_them(shop: Callable[..., Path]) -> None:
    folder = shop()
    train("full", "train.max_steps=2", "run.dir=runs/full")
    base, tuned = weights(folder / "model"), weights(folder / "runs/full/export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs/full/export")
    first = len(AutoTokenizer.from_pretrained(folder / "model"))
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == [first, first + 1]
    assert tokenizer.decode(tokenizer("a colour")["input_ids"][-1:], skip_special_tokens=True) == "colour"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean, rows = base[name].mean(dim=0), tuned[name]
        assert rows.shape[0] % 64 == 0
        moved = (rows[first : first + 2] - mean).abs()
        assert 0 < float(moved.max()) < 0.01, "two steps away from where they began"


@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.long), 40])
def test_an_adapter_trains_their_rows_and_no_other_and_goes_on_where_it_ended(
    shop: Callable[..., Path], padding: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shop(padding=padding)
    keys = ("train.max_steps=4", "run.dir=runs/one", "checkpoint.every_steps=2", "optimizer.lr=0.05")
    train("lora", *keys)
    assert "2 token rows that the base never trained are trained too" in capsys.readouterr().out
    base, tuned = weights(folder / "model"), weights(folder / "runs/one/export")
    first = len(AutoTokenizer.from_pretrained(folder / "model"))
    old = base["lm_head.weight"].shape[0]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kept = [row for row in range(old) if row not in (first, first + 1)]
        assert torch.equal(tuned[name][kept], base[name][kept])
        assert tuned[name].shape[0] == (old if padding else -(-(first + 2) // 64) * 64)
        mean = base[name][:first].mean(dim=0)
        assert float((tuned[name][first : first + 2] - mean).abs().min(dim=1).values.max()) > 0
    adapter = export(compose(None, ["run.dir=runs/one", "step=4", "merge=false"], ExportConfig))
    ids = torch.randint(0, first + 2, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = load_adapter(adapter, torch.float32)(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "runs/one/export", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(alone, merged, rtol=1e-4, atol=1e-4)
    assert chat.main(["--model", "runs/one/export", "--base-model", "model", "--base", "--once", "What colour?"]) == 0


@pytest.mark.long
def test_a_run_that_begins_with_an_export_keeps_the_rows_that_it_has_trained(shop: Callable[..., Path]) -> None:
    folder = shop()
    train("full", "train.max_steps=2", "run.dir=runs/one", "optimizer.lr=0.01")
    train("full", "model.path=runs/one/export", "train.max_steps=1", "run.dir=runs/two", "optimizer.lr=1e-7")
    one, two = (weights(folder / f"runs/{name}/export") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_a_token_that_no_row_holds_is_refused_before_the_model_is_loaded(shop: Callable[..., Path]) -> None:
    folder = shop()
    with pytest.raises(ConfigError, match=r"model\.add_tokens: '<river>' in no train row"):
        train("full", 'model.add_tokens=[colour,"<river>"]', "train.max_steps=2", "run.dir=runs/full")
    metrics = folder / "runs/full/metrics.jsonl"
    assert not metrics.exists() or not [json.loads(line) for line in metrics.read_text().splitlines()]
