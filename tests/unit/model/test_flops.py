"""The FLOPs that utilisation and plans count, against torch's own counter on packs through the training loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftdist.model.attention import attention_forward, register
from sftdist.model.backends import sdpa
from sftdist.model.backends.interface import Documents, LayerArguments
from sftdist.model.cost import recomputed_flops, train_flops
from sftdist.model.load import enable_checkpointing
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import LossModel
from tests.models import MIXTURES_OF_EXPERTS, shape, tiny_model
from tests.training_cases import pack

LENGTHS, LAYERS, R = [20, 7, 12], 2, 4
KINDS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]


def visible_only(query: Tensor, key: Tensor, value: Tensor, documents: Documents, arguments: LayerArguments) -> Tensor:
    """Attention one query at a time over the keys that it sees: the counter counts those pairs and no others."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    outputs, first = [], 0
    for length in documents.lengths:
        for place in range(first, first + length):
            start = first if arguments.sliding_window is None else max(first, place + 1 - arguments.sliding_window)
            seen = slice(start, place + 1)
            scores = query[:, :, place : place + 1] @ key[:, :, seen].transpose(2, 3) * arguments.scaling
            outputs.append(scores.softmax(-1) @ value[:, :, seen])
        first += length
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.fixture(autouse=True)
def counted_attention() -> Iterator[None]:
    name = register("sdpa")
    tiny_model("llama")  # loading registers it, too: from now on it stays what it is
    honest = ALL_ATTENTION_FUNCTIONS[name]
    yield
    ALL_ATTENTION_FUNCTIONS.register(name, honest)


def counted(family: str, lora: bool, recompute: int) -> tuple[int, float]:
    """What torch counts in a training pass over a pack, and what the formula says."""
    changes: dict[str, Any] = {"num_hidden_layers": LAYERS}
    if family.startswith("gemma"):
        changes["layer_types"] = KINDS
    model = tiny_model(family, **changes)
    if family in MIXTURES_OF_EXPERTS:
        model.config._experts_implementation = "eager"  # a grouped product is not counted
    backend = replace(sdpa.BACKEND, attend=visible_only)
    ALL_ATTENTION_FUNCTIONS.register(register("sdpa"), partial(attention_forward, backend))
    if recompute:
        enable_checkpointing(model, layers=recompute)
    trained = attach(model, LoraSpec(r=R))[0] if lora else model
    batch = pack(LENGTHS, seed=0)
    counter = FlopCounterMode(display=False)
    with counter:
        LossModel(trained, num_sources=2, chunk=16).train()(**batch.inputs()).sum.backward()
    config = AutoConfig.for_model(**shape(family, **changes)).to_dict()
    method, r = ("lora", R) if lora else ("full", 0)
    formula = train_flops(config, LENGTHS, len(batch.index), method=method, r=r)
    return counter.get_total_flops(), formula + recomputed_flops(config, LENGTHS, recompute, method=method, r=r)


@pytest.mark.parametrize("recompute", [0, 1, LAYERS])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", DENSE)
def test_flops_are_those_that_torch_counts(family: str, lora: bool, recompute: int) -> None:
    found, formula = counted(family, lora, recompute)
    assert formula == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("recompute", [0, LAYERS])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_flops_of_experts_are_those_of_the_chosen_ones(family: str, recompute: int) -> None:
    found, formula = counted(family, False, recompute)
    assert formula == pytest.approx(found, rel=0.01)


def test_one_document_of_the_same_length_is_told_apart() -> None:
    """The measure is sharp enough: attention over the whole pack would be seen, and so would adapters left out."""
    found, formula = counted("llama", True, 0)
    config = AutoConfig.for_model(**shape("llama", num_hidden_layers=LAYERS)).to_dict()
    supervised = len(pack(LENGTHS, seed=0).index)
    for wrong in (
        train_flops(config, [sum(LENGTHS)], supervised, method="lora", r=R),
        train_flops(config, LENGTHS, supervised, method="lora", r=0),
        train_flops(config, LENGTHS, sum(LENGTHS), method="lora", r=R),
        train_flops(config, LENGTHS, supervised, method="full"),
    ):
        assert abs(wrong / found - 1) > 0.01 > abs(formula / found - 1)
