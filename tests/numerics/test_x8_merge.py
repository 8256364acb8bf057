"""X8 for adapters: a merged model equals base + adapter, layer by layer, and a merge that does not is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear, ParamWrapper
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftdist.core.errors import CheckpointError
from sftdist.model.load import is_tied
from sftdist.model.lora import LayerMerge, LoraSpec, attach, merged_parameters, require_change
from sftdist.model.loss import LossModel
from tests.models import tiny_model
from tests.packed import Row, random_row

ROW = random_row([13, 1, 24, 9])
SPECS = {
    "lora": LoraSpec(r=4, alpha=8),
    "rslora": LoraSpec(r=4, alpha=8, rslora=True),
    "dora": LoraSpec(r=4, alpha=8, dora=True),
}


def trained(family: str, spec: LoraSpec, rows: list[int], steps: int = 2, lr: float = 0.1) -> PeftModel:
    torch.manual_seed(0)  # adapters start from random numbers
    model, _ = attach(tiny_model(family), spec, train_rows=rows)
    loss_model = LossModel(model, num_sources=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        output = loss_model(**ROW.fields())
        (output.sum / output.counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def merge(model: PeftModel, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, LayerMerge]]:
    """Every merged tensor, and what each merge did."""
    proofs: dict[str, LayerMerge] = {}
    values = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    return dict(merged_parameters(model, values.__getitem__, dtype, proofs)), proofs


def model_of(family: str, merged: dict[str, Tensor]) -> PreTrainedModel:
    model = tiny_model(family, seed=1)  # other weights: all of them must come from the merge
    left_out = model.load_state_dict(merged, strict=False)
    assert left_out.unexpected_keys == []
    assert left_out.missing_keys == (["lm_head.weight"] if is_tied(model) else [])
    return model


def logits(model: torch.nn.Module, row: Row) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=row.ids[None], use_cache=False).logits
    return result


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("kind", sorted(SPECS))
def test_merged_equals_base_plus_adapter_and_a_fresh_load_equals_both(kind: str, family: str, tmp_path: Path) -> None:
    model = trained(family, SPECS[kind], rows=[5, 9])
    attention = "sdpa" if family not in {"gemma2", "gpt_oss"} else "eager"
    model.set_attn_implementation(attention)
    adapted = logits(model, ROW)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    tensors, proofs = merge(model)

    require_change(proofs, "fp32")
    assert all(proof.error < 1e-3 for proof in proofs.values())
    assert all(proof.change > 0.0 for proof in proofs.values())
    assert all(proof.kept == pytest.approx(1.0, abs=1e-3) for proof in proofs.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    merged = model_of(family, tensors)
    merged.set_attn_implementation(attention)
    torch.testing.assert_close(logits(merged, ROW), adapted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=merged.config._attn_implementation
    ).eval()
    torch.testing.assert_close(logits(fresh, ROW), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "family"), [(Linear, "llama"), (ParamWrapper, "mixtral")])
def test_a_merge_that_skips_a_layer_is_refused_by_the_layers_name(
    monkeypatch: pytest.MonkeyPatch, kind: type[Linear], family: str
) -> None:
    """A16, also where the change is so small that logits in bf16 would not show it."""
    model = trained(family, SPECS["lora"], rows=[], lr=1e-3)
    honest, merged = kind.merge, []

    def skips_the_third(self: Linear, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        merged.append(self)
        if len(merged) != 3:
            honest(self, safe_merge, adapter_names)

    monkeypatch.setattr(kind, "merge", skips_the_third)
    with pytest.raises(CheckpointError, match=r"layers\.\d\.\S+ merged is not base \+ adapter"):
        merge(model)


def test_a_merge_with_another_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llama", SPECS["rslora"], rows=[])
    honest = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: honest(self, name) / 2)
    with pytest.raises(CheckpointError, match="is not base \\+ adapter"):
        merge(model)


def test_a_model_that_equals_its_base_is_refused() -> None:
    """Untrained; and trained so little that nothing is left of it in bf16, though something is in fp32."""
    _, untouched = merge(trained("llama", SPECS["lora"], rows=[], steps=0))
    with pytest.raises(CheckpointError, match="learned nothing"):
        require_change(untouched, "fp32")

    model = trained("llama", SPECS["lora"], rows=[], steps=1, lr=1e-7)
    for name, parameter in model.named_parameters():  # a base in bf16, as most are published
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16().float()
    _, exact = merge(model)
    require_change(exact, "fp32")
    _, rounded = merge(model, torch.bfloat16)
    assert all(abs(proof.kept) < 0.5 for proof in rounded.values())
    with pytest.raises(CheckpointError, match=r"lost in the rounding to bf16.*export\.dtype=fp32"):
        require_change(rounded, "bf16")


def test_bf16_adapters_are_merged_in_float32() -> None:
    model = trained("llama", SPECS["lora"], rows=[])
    tensors, proofs = merge(model.to(torch.bfloat16))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(proof.error < 1e-3 for proof in proofs.values())
