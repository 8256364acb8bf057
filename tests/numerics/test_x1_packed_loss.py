"""X1: the loss of a packed row is the token-weighted mean of its documents run alone; gradients too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sftdist.model.backends import interface
from sftdist.model.backends.interface import Backend, Documents, LayerArguments
from sftdist.model.loss import LossModel
from tests.models import SHAPES, WINDOW, tiny_model
from tests.packed import Row, alone, gradients, random_row, relative

TOLERANCE = 1e-6
LENGTHS = [13, 1, 3 * WINDOW, 9]


@pytest.mark.parametrize("family", sorted(SHAPES))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradients_equal_documents_alone(family: str, checkpointing: bool) -> None:
    model = tiny_model(family).train()
    row = random_row(LENGTHS)
    expected, count = alone(model, row)
    expected_gradients = gradients(model, expected / count)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    output = LossModel(model, num_sources=2, chunk=7)(**row.fields())

    assert output.counts.sum().item() == count
    assert relative(output.sum / count, expected / count) < TOLERANCE
    assert relative(output.per_source.sum(), expected) < TOLERANCE
    assert relative(gradients(model, output.sum / count), expected_gradients) < TOLERANCE


def _joined(row: Row) -> Row:
    ends = torch.tensor([0, len(row.ids)], dtype=torch.int32)
    return replace(row, cu_seqlens=ends, source=row.source[:1])


def _running_positions(row: Row) -> Row:
    return replace(row, positions=torch.arange(len(row.ids)))


@pytest.mark.parametrize("wrong", [_joined, _running_positions])
def test_plain_causal_attention_over_the_pack_and_running_positions_are_rejected(wrong: Callable[[Row], Row]) -> None:
    model = tiny_model("gpt2")  # its positions are learned: rotary ones see differences only
    row = random_row(LENGTHS)
    expected, count = alone(model, row)
    output = LossModel(model, num_sources=2)(**wrong(row).fields())
    assert relative(output.sum / count, expected / count) > 1_000 * TOLERANCE


def _ignoring(name: str, value: Any) -> Callable[..., Tensor]:
    honest = Backend.__call__

    def attend(self: Backend, q: Tensor, k: Tensor, v: Tensor, documents: Documents, given: LayerArguments) -> Tensor:
        return honest(self, q, k, v, documents, replace(given, **{name: value}))

    return attend


@pytest.mark.parametrize(
    ("family", "argument"),
    [("mistral", "sliding_window"), ("gemma3", "sliding_window"), ("gemma2", "softcap"), ("gpt_oss", "s_aux")],
)
def test_an_ignored_argument_of_the_attention_is_rejected(
    family: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    row = random_row(LENGTHS)
    expected, count = alone(model, row)
    monkeypatch.setattr(interface.Backend, "__call__", _ignoring(argument, None))
    output = LossModel(model, num_sources=2)(**row.fields())
    assert relative(output.sum / count, expected / count) > TOLERANCE


def test_a_mean_of_means_is_rejected() -> None:
    model = tiny_model("llama")
    row = random_row(LENGTHS)
    expected, count = alone(model, row)
    output = LossModel(model, num_sources=2)(**row.fields())
    mean_of_means = (output.per_source / output.counts).mean()
    assert relative(output.sum / count, expected / count) < TOLERANCE
    assert relative(mean_of_means, expected / count) > TOLERANCE


def test_hand_built_targets_are_shifted_inside_documents_and_counted_once() -> None:
    """Documents of 1, 2 and 5 tokens with masked prompts: the terms of the sum are exactly the literal targets."""
    model = tiny_model("llama")
    ids = torch.tensor([11, 21, 22, 31, 32, 33, 34, 35])
    targets = torch.tensor([-100, 22, -100, -100, -100, 34, 35, -100])
    cu_seqlens = torch.tensor([0, 1, 3, 8], dtype=torch.int32)
    row = Row(ids, targets, torch.tensor([0, 0, 1, 0, 1, 2, 3, 4]), cu_seqlens, torch.tensor([0, 1, 2]))
    expected, count = alone(model, row)
    output = LossModel(model, num_sources=3)(**row.fields())
    assert count == 3
    assert output.counts.tolist() == [0.0, 1.0, 2.0]
    assert relative(output.sum, expected) < TOLERANCE
