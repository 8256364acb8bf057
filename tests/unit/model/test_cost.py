"""Costs against what torch counts on real (tiny) models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from benchmarks.predictions import LLAMA_8B
from sftdist.model.cost import (
    Setup,
    attention_terms,
    dense_flops,
    head_flops,
    lora_parameters,
    memory,
    parameters,
    shape_of,
    train_flops,
    visible_pairs,
)
from sftdist.model.lora import LoraSpec, attach
from tests.models import MIXTURES_OF_EXPERTS, SHAPES, WINDOW, shape, tiny_model

GATED = sorted(set(SHAPES) - {"gpt2"})


def _config(family: str) -> dict[str, Any]:
    mapping: dict[str, Any] = AutoConfig.for_model(**shape(family)).to_dict()
    return mapping


@pytest.mark.parametrize("family", GATED)
def test_parameters_equal_the_model(family: str) -> None:
    assert parameters(_config(family)).total == sum(p.numel() for p in tiny_model(family).parameters())


def test_parameters_of_a_published_model() -> None:
    assert parameters(LLAMA_8B).total == 8_030_261_248


@pytest.mark.parametrize("family", sorted(set(GATED) - {"gpt_oss"}))  # its router is not counted as a Linear
def test_lora_parameters_equal_the_adapter(family: str) -> None:
    _, coverage = attach(tiny_model(family), LoraSpec(r=4))
    fused_phi3 = family == "phi3"  # q, k, v and gate, up are one matrix there: fewer inputs, the same outputs
    assert (coverage.trainable == lora_parameters(_config(family), 4)) != fused_phi3


@pytest.mark.parametrize("family", sorted(set(GATED) - MIXTURES_OF_EXPERTS))
@pytest.mark.parametrize("training", [False, True])
def test_flops_equal_torchs_counter(family: str, training: bool) -> None:
    model, tokens = tiny_model(family), 20
    model.set_attn_implementation("eager")
    config = _config(family)
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=torch.arange(tokens)[None], use_cache=False).logits
        if training:
            logits.sum().backward()
    pairs = sum(flops for flops, _ in attention_terms(config)) * tokens**2  # eager computes the masked ones too
    factor = 3 if training else 1
    expected = factor * ((dense_flops(config) + head_flops(config)) * tokens + pairs)
    rotary = tokens * shape_of(config).head_dim * (2 if family == "gemma3" else 1)  # an outer product, no gradient
    assert counter.get_total_flops() == pytest.approx(expected, abs=rotary)


def test_frozen_weights_save_one_of_three_products() -> None:
    full, lora = (train_flops(LLAMA_8B, [1000], 500, method=method) for method in ("full", "lora"))
    assert 0.66 < lora / full < 0.68
    assert 1.003 < train_flops(LLAMA_8B, [1000], 500, method="lora", r=16) / lora < 1.012


@pytest.mark.parametrize("window", [None, 1, 5, 50])
@pytest.mark.parametrize("length", [1, 5, 17])
def test_visible_pairs_equal_the_mask(length: int, window: int | None) -> None:
    pairs = sum(1 for q in range(length) for k in range(length) if k <= q and (window is None or q - k < window))
    assert visible_pairs(length, window) == pairs


def test_attention_terms_hold_the_windows() -> None:
    per_layer = 4.0 * 4 * 8
    assert attention_terms(_config("llama")) == ((2 * per_layer, None),)
    assert set(attention_terms(_config("gemma2"))) == {(per_layer, None), (per_layer, WINDOW)}


def test_packing_short_documents_costs_less_than_one_long_one() -> None:
    assert train_flops(LLAMA_8B, [512] * 16, 4096) < train_flops(LLAMA_8B, [8192], 4096)


def test_each_zero_stage_divides_one_more_part() -> None:
    """Bytes a parameter: at stage 1 the last micro-batch's gradients lie beside the sums."""
    count = parameters(LLAMA_8B).total
    found = [memory(LLAMA_8B, Setup(stage=stage, world=8, pack_tokens=8192)) for stage in range(4)]
    per_parameter = {
        part: [sizes[part] / count for sizes in found] for part in ("weights", "gradients", "masters", "optimizer")
    }
    assert per_parameter == {
        "weights": [2, 2, 2, 2 / 8],
        "gradients": [4, 6, 4 / 8, 4 / 8],
        "masters": [4, 4 / 8, 4 / 8, 4 / 8],
        "optimizer": [8, 8 / 8, 8 / 8, 8 / 8],
    }
    assert [sizes["buckets"] / 2**20 for sizes in found] == [0, 256, 256, 128]
    rest = ("activations", "logits", "context")
    assert all([sizes[part] for part in rest] == [found[0][part] for part in rest] for sizes in found)


def test_float32_has_masters_where_deepspeed_makes_them() -> None:
    found = [memory(LLAMA_8B, Setup(stage=stage, world=1, pack_tokens=8192, precision="fp32")) for stage in (0, 1)]
    assert [sizes["masters"] / parameters(LLAMA_8B).total for sizes in found] == [0, 4]
