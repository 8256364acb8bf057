"""Text fine-tuning of a checkpoint with a vision tower: what comes out is the whole checkpoint, its tower untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3ForConditionalGeneration

from sftdist.commands import chat
from sftdist.commands.export import run as export
from sftdist.core.config import compose
from sftdist.core.errors import CheckpointError
from sftdist.core.settings import ExportConfig
from sftdist.model.lora import load_adapter
from sftdist.train import run
from tests.e2e.workshop import SMALL, write_rows
from tests.multimodal import PROCESSOR, gemma3_folder, of_the_tower

pytestmark = pytest.mark.timeout(600)

KEYS = ("model.path=model", "data.train=my.jsonl", *SMALL, "checkpoint.every_steps=1")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    gemma3_folder(tmp_path / "model")
    write_rows(tmp_path / "my.jsonl", 60)
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def require_whole(base: Path, tuned: Path) -> None:
    """The very names of the base's tensors; those of the tower byte for byte, others not; the processor beside them."""
    before, after = weights(base), weights(tuned)
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if of_the_tower(name)} <= same
    assert any("self_attn.q_proj" in name for name in before.keys() - same)
    _, info = Gemma3ForConditionalGeneration.from_pretrained(tuned, output_loading_info=True)
    assert not any(info.values()), info
    assert {name: json.loads((tuned / name).read_text()) for name in PROCESSOR} == PROCESSOR


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_full_fine_tune_keeps_the_tower_and_says_so(
    shop: Path, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run(compose("full", [*KEYS, f"zero.stage={stage}", "train.max_steps=2", "run.dir=runs/one"]))
    screen = capsys.readouterr().out
    assert "frozen, and kept in the export: model.multi_modal_projector, model.vision_tower" in screen
    assert "a gradient reaches all 28 trained tensors" in screen
    require_whole(shop / "model", shop / "runs/one/export")
    again = export(compose(None, ["run.dir=runs/one", "step=2"], ExportConfig))
    live, offline = weights(shop / "runs/one/export"), weights(again)
    assert live.keys() == offline.keys()
    assert all(torch.equal(live[name], offline[name]) for name in live)
    if stage == 1:
        words = ["--model", "runs/one/export", "--base-model", "model", "--base", "--once", "Hi?", "--max-new-tokens=4"]
        assert chat.main(words) == 0
        changed = weights(shop / "model")
        changed["vision_tower.vision_model.post_layernorm.weight"] += 1
        save_file(changed, shop / "model/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="it belongs to other weights"):
            export(compose(None, ["run.dir=runs/one", "step=1"], ExportConfig))


def test_an_adapter_belongs_to_the_decoder_alone(shop: Path) -> None:
    keys = (*KEYS, "optimizer.lr=0.02", "zero.stage=1")
    run(compose("lora", [*keys, "train.max_steps=2", "run.dir=runs/whole"]))
    require_whole(shop / "model", shop / "runs/whole/export")
    adapter = export(compose(None, ["run.dir=runs/whole", "step=2", "merge=false"], ExportConfig))
    ids = torch.randint(5, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = load_adapter(adapter, torch.float32)(input_ids=ids).logits
        merged = Gemma3ForConditionalGeneration.from_pretrained("runs/whole/export", dtype=torch.float32)(ids).logits
    assert float((alone - merged).norm() / merged.norm()) < 0.02, "the merged weights are rounded to bf16"
