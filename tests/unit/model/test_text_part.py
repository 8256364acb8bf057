"""Which parameters of a model text passes through, and that nothing else is counted, frozen, adapted or quantised."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import PreTrainedModel

from sftdist.core.errors import ConfigError
from sftdist.model import cost
from sftdist.model.backends.interface import Documents
from sftdist.model.load import decoder_layers
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import hidden_states
from sftdist.model.quantised import is_quantised, quantise
from sftdist.model.text_part import freeze_outside_text, outside_text, parts_named
from tests.models import SHAPES, tiny_model
from tests.multimodal import of_the_tower, tiny_gemma3


@pytest.mark.parametrize("family", SHAPES)
def test_text_passes_through_all_of_a_text_model(family: str) -> None:
    assert not outside_text(tiny_model(family))


def test_a_tower_and_its_projector_lie_outside_and_are_what_gets_no_gradient() -> None:
    model = tiny_gemma3(dtype=torch.float32)
    outside = outside_text(model)
    assert set(outside) == {name for name, _ in model.named_parameters() if of_the_tower(name)}
    assert parts_named(outside) == "model.multi_modal_projector, model.vision_tower"
    ids, places = torch.arange(12) + 5, torch.arange(12)
    documents = Documents.of_lengths([12], torch.device("cpu"))
    hidden = hidden_states(model, ids, places, documents)
    model.get_output_embeddings()(hidden).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(outside)
    freeze_outside_text(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(outside)


def test_layers_are_those_of_the_decoder() -> None:
    model = tiny_gemma3()
    assert [type(layer).__name__ for layer in decoder_layers(model)] == ["Gemma3DecoderLayer"] * 2


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_stay_off_the_tower_though_its_layers_have_the_same_names(target: str | list[str]) -> None:
    model = tiny_gemma3(dtype=torch.float32)
    assert any(name.endswith("vision_tower.encoder.layers.0.self_attn.q_proj.weight") for name in outside_text(model))
    adapted, coverage = attach(model, LoraSpec(r=2, target=target))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if of_the_tower(name)]
    assert coverage.layers == 2 * (7 if target == "all-linear" else 2)
    assert not coverage.experts, "the tower's probe is a tensor of three dimensions, and no expert"


def test_a_target_of_the_tower_matches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"tune\.target"):
        attach(tiny_gemma3(), LoraSpec(r=2, target=["fc1"]))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_tower_is_not_held_in_four_bits() -> None:
    model = tiny_gemma3()
    quantise(model, double_quant=True, dtype=torch.bfloat16, device=torch.device("cpu"))
    held = [name for name, parameter in model.named_parameters() if is_quantised(parameter)]
    assert len(held) == 14
    assert not [name for name in held if of_the_tower(name)]


def test_the_planner_counts_both_parts() -> None:
    model: PreTrainedModel = tiny_gemma3()
    config, outside = model.config.to_dict(), sum(p.numel() for p in outside_text(model).values())
    assert cost.outside_text(config) == outside
    assert cost.parameters(config).total == sum(p.numel() for p in model.parameters()) - outside
    setup = cost.Setup(stage=3, world=2, pack_tokens=64)
    alone = {key: value for key, value in config.items() if key != "vision_config"}
    assert cost.memory(config, setup)["weights"] - cost.memory(alone, setup)["weights"] == outside * 2 / 2
