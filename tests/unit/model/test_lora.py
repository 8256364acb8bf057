"""What an adapter reaches and trains."""

from __future__ import annotations

import pytest
import torch

from sftdist.core.errors import ConfigError
from sftdist.model.load import enable_checkpointing, grow_vocabulary
from sftdist.model.lora import LoraSpec, attach, untrained_rows
from sftdist.model.loss import LossModel
from tests.models import MIXTURES_OF_EXPERTS, SHAPES, tiny_model
from tests.packed import random_row

ROW = random_row([13, 1, 24, 9])


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
def test_every_adapter_moves_within_two_steps(checkpointing: str) -> None:
    """S18: with activation checkpointing the layers' adapters stay at zero if no input requires a gradient."""
    model = tiny_model("llama").train()
    if checkpointing != "off":
        enable_checkpointing(model, reentrant=checkpointing == "reentrant")
    adapted, _ = attach(model, LoraSpec(r=4))
    loss_model = LossModel(adapted, num_sources=2).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss_model(**ROW.fields()).sum.backward()
        optimizer.step()
    still = [name for name, p in adapted.named_parameters() if "lora_B" in name and not p.any()]
    assert still == []


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_all_linear_reaches_every_linear_layer_but_the_head(family: str) -> None:
    model = tiny_model(family)
    head = model.get_output_embeddings()
    expected = sum(type(m).__name__ in {"Linear", "Conv1D"} and m is not head for m in model.modules())
    adapted, coverage = attach(model, LoraSpec(r=2))
    assert coverage.layers == expected + len(coverage.experts)
    assert bool(coverage.experts) == (family in MIXTURES_OF_EXPERTS)
    assert coverage.not_reached == ()
    assert coverage.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (LoraSpec(r=2, dora=True), "tune.dora"),
        (LoraSpec(r=2, dropout=0.1), "tune.dropout"),
        (LoraSpec(r=2, target=["q_proj"]), "tune.target"),
    ],
)
def test_fused_experts_that_are_not_reached_are_named(spec: LoraSpec, reason: str) -> None:
    _, coverage = attach(tiny_model("mixtral"), spec)
    assert coverage.experts == ()
    assert len(coverage.not_reached) == 4
    assert all("experts" in line and reason in line for line in coverage.not_reached)


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.target"):
        attach(tiny_model("llama"), LoraSpec(target=["no_such_layer"]))


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_exactly_the_named_token_rows_train(family: str) -> None:
    model = tiny_model(family)
    before = model.get_input_embeddings().weight.detach().clone()
    rows = sorted(ROW.ids[:2].tolist())
    adapted, _ = attach(model, LoraSpec(r=2), train_rows=rows)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    LossModel(adapted, num_sources=2)(**ROW.fields()).sum.backward()
    optimizer.step()
    merged = adapted.merge_and_unload()
    changed = (merged.get_input_embeddings().weight.detach() != before).any(dim=1).nonzero().squeeze(1)
    assert changed.tolist() == rows


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_untrained_rows_are_found_by_norm_and_by_neighbour(family: str) -> None:
    model = tiny_model(family)
    assert untrained_rows(model, range(128)) == [0]  # the padding row is zero
    with torch.no_grad():
        matrix = model.get_output_embeddings().weight
        matrix[40] *= 1e-3
        matrix[61] = matrix[60] + 1e-5
    assert untrained_rows(model, [3, 40, 60, 61, 80]) == [40, 60, 61]


def test_rows_that_were_grown_are_untrained() -> None:
    model = tiny_model("llama")
    grow_vocabulary(model, 131)
    assert untrained_rows(model, [5, 128, 129, 130]) == [128, 129, 130]
