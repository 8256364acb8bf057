"""A15, S18: activation checkpointing changes nothing, with full weights and with adapters, at every ZeRO stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sftdist.core.distributed import World
from sftdist.model.lora import LoraSpec
from tests.ranks import run_ranks
from tests.training_cases import Case, Run, distance, make_module, train_case, weights_in

CASES = [
    Case(stage, precision, family, lora=lora)
    for stage, precision, family in [
        (0, "fp32", "llama"),
        (2, "fp32", "llama_tied"),
        (3, "fp32", "llama_tied"),
        (3, "bf16", "llama"),
    ]
    for lora in (None, LoraSpec(r=4))
]


def both(world: World) -> list[tuple[Run, Run]]:
    return [(train_case(world, case), train_case(world, replace(case, checkpointing=True))) for case in CASES]


def test_checkpointing_changes_nothing() -> None:
    for case, (plain, checkpointed) in zip(CASES, run_ranks(both, 2)[0], strict=True):
        assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-6), case
        assert distance(checkpointed.weights, plain.weights) < 1e-6, case
        before = weights_in(make_module(case))
        trained = [name for name, value in checkpointed.weights.items() if (value != before[name]).any()]
        if case.lora is not None and case.precision == "fp32":
            assert trained
            assert all("lora_" in name for name in trained)
            assert sum("lora_B" in name for name in trained) == sum("lora_B" in name for name in before), "a layer at 0"
