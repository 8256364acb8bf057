"""X8 for adapters: a merged model equals base + adapter, and a merge that does not is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor
from transformers import AutoModelForCausalLM

from sftdist.core.errors import CheckpointError
from sftdist.model.load import is_tied
from sftdist.model.lora import Coverage, LoraSpec, attach, merge
from sftdist.model.loss import LossModel
from tests.models import tiny_model
from tests.packed import Row, random_row

ROW = random_row([13, 1, 24, 9])
SPECS = {
    "lora": LoraSpec(r=4, alpha=8),
    "rslora": LoraSpec(r=4, alpha=8, rslora=True),
    "dora": LoraSpec(r=4, alpha=8, dora=True),
}


def trained(family: str, spec: LoraSpec, rows: list[int], steps: int = 2) -> tuple[PeftModel, Coverage]:
    torch.manual_seed(0)  # adapters start from random numbers
    model, coverage = attach(tiny_model(family), spec, train_rows=rows)
    loss_model = LossModel(model, num_sources=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        output = loss_model(**ROW.fields())
        (output.sum / output.counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, coverage


def logits(model: torch.nn.Module, row: Row) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=row.ids[None], use_cache=False).logits
    return result


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", sorted(SPECS))
def test_merged_equals_base_plus_adapter_and_a_fresh_load_equals_both(kind: str, family: str, tmp_path: Path) -> None:
    model, coverage = trained(family, SPECS[kind], rows=[5, 9])
    model.set_attn_implementation("sdpa" if family not in {"gemma2", "gpt_oss"} else "eager")
    adapted = logits(model, ROW)

    merged, proof = merge(model)

    assert proof.error < 1e-5
    assert proof.moved > 1e-3
    assert coverage.token_rows == (5, 9)
    torch.testing.assert_close(logits(merged, ROW), adapted, rtol=1e-4, atol=1e-4)
    assert is_tied(merged) == (family == "llama_tied")
    merged.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=merged.config._attn_implementation
    ).eval()
    torch.testing.assert_close(logits(fresh, ROW), adapted, rtol=1e-4, atol=1e-4)


def test_a_merge_that_skips_a_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained("llama", SPECS["lora"], rows=[])
    honest, merged = Linear.merge, []

    def skips_the_third(self: Linear, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        merged.append(self)
        if len(merged) != 3:
            honest(self, safe_merge, adapter_names)

    monkeypatch.setattr(Linear, "merge", skips_the_third)
    with pytest.raises(CheckpointError, match="differ from base \\+ adapter"):
        merge(model)


def test_an_adapter_that_learned_nothing_is_refused() -> None:
    model, _ = trained("llama", SPECS["lora"], rows=[], steps=0)
    with pytest.raises(CheckpointError, match="learned nothing"):
        merge(model)


def test_bf16_adapters_are_merged_in_float32() -> None:
    model, _ = trained("llama", SPECS["lora"], rows=[])
    merged, proof = merge(model.to(torch.bfloat16))
    assert proof.error < 1e-5
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
