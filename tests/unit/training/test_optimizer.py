"""X10: the learning rate is the closed form, to the last step; what decays and what does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sftdist.model.lora import LoraSpec, attach
from sftdist.training.optimizer import OptimizerSpec, decays, lr_at
from tests.models import tiny_model

PEAK, TOTAL, WARMUP, FLOOR = 3e-4, 101, 10, 0.1


def rate(step: int, schedule: str = "cosine", total: int = TOTAL, warmup: int = WARMUP) -> float:
    return lr_at(step, lr=PEAK, total=total, warmup=warmup, schedule=schedule, min_ratio=FLOOR)


def test_cosine_equals_the_closed_form_at_every_step() -> None:
    for step in range(TOTAL):
        if step < WARMUP:
            expected = PEAK * (step + 1) / (WARMUP + 1)
        else:
            angle = math.pi * ((step - WARMUP) / (TOTAL - 1 - WARMUP))
            expected = PEAK * (FLOOR + (1 - FLOOR) * (0.5 * (1 + math.cos(angle))))
        assert rate(step) == expected


@pytest.mark.parametrize(("schedule", "last"), [("cosine", PEAK * FLOOR), ("linear", PEAK * FLOOR), ("constant", PEAK)])
def test_first_peak_and_last(schedule: str, last: float) -> None:
    assert rate(0, schedule) == PEAK / (WARMUP + 1) > 0.0
    assert rate(WARMUP, schedule) == PEAK
    assert rate(TOTAL - 1, schedule) == last


def test_linear_is_a_line() -> None:
    steps = [rate(step, "linear") - rate(step + 1, "linear") for step in range(WARMUP, TOTAL - 1)]
    assert max(steps) - min(steps) < 1e-12 * PEAK + 1e-18


@given(total=st.integers(1, 500), ratio=st.floats(0.0, 1.0), schedule=st.sampled_from(["cosine", "linear", "constant"]))
def test_any_run_stays_between_zero_and_the_peak(total: int, ratio: float, schedule: str) -> None:
    warmup = round(ratio * total)
    rates = [rate(step, schedule, total, warmup) for step in range(total)]
    assert all(0.0 < value <= PEAK * (1 + 1e-12) for value in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("step", [-1, TOTAL])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside the run"):
        rate(step)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="cosine, linear or constant"):
        rate(20, "polynomial")
    with pytest.raises(ValueError, match="adamw, sgd or"):
        OptimizerSpec(name="lion").build([(nn.Parameter(torch.zeros(2)), True)])


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_matrices_decay_but_norms_and_embeddings_do_not(family: str) -> None:
    for name, decay in decays(tiny_model(family)).items():
        assert decay == (name.endswith("proj.weight") or name == "lm_head.weight"), name


def test_adapters_decay_and_token_rows_do_not() -> None:
    model, _ = attach(tiny_model("llama"), LoraSpec(r=2), train_rows=(3, 4))
    chosen = decays(model)
    assert any("trainable_tokens" in name for name in chosen)
    assert all(decay == ("lora_" in name) for name, decay in chosen.items())


def test_groups_hold_every_parameter_once() -> None:
    pairs = [(nn.Parameter(torch.zeros(n + 1)), n % 2 == 0) for n in range(5)]
    groups = OptimizerSpec(weight_decay=0.1).build(pairs).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [3, 2]


def test_weight_decay_changes_sgd_too() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = OptimizerSpec(name="sgd", weight_decay=0.5).build([(weight, True)])
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.full((3,), 0.95))
