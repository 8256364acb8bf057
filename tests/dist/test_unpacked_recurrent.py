"""Hybrid models without packing: every conversation a forward of its own, on partitions as on whole weights (X3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sftdist.core.distributed import World
from sftdist.model.lora import LoraSpec
from tests.ranks import run_ranks
from tests.training_cases import Case, distance, make_engine, pack, train_step, weights_of

TOLERANCE = 2e-5  # of float32 sums in another order, over three steps


def train(world: World, case: Case) -> tuple[list[float], Any]:
    """Three steps of eight conversations, with the losses before and the weights after."""
    engine = make_engine(case, world)
    losses = []
    for step, lr in enumerate(case.lrs):
        packs = [pack([5 + 3 * i], seed=100 * step + i) for i in range(8)]
        losses.append(train_step(engine, world, packs, lr)[0])
    weights = weights_of(engine)
    engine.close()
    return losses, weights


@pytest.mark.parametrize("family", ["lfm2", pytest.param("qwen3_5", marks=pytest.mark.long), "falcon_h1"])
def test_every_stage_on_two_ranks_is_one_process(family: str) -> None:
    """Weights of short convolutions are handed to functions; empty ones of ZeRO 3 would end the first forward."""
    losses, weights = run_ranks(train, 1, Case(0, family=family))[0]
    for stage in (2, 3):
        others, found = run_ranks(train, 2, Case(stage, family=family))[0]
        np.testing.assert_allclose(others, losses, rtol=TOLERANCE)
        assert distance(found, weights) < TOLERANCE


def test_adapters_beside_convolutions_on_partitions() -> None:
    case = Case(0, family="lfm2", lora=LoraSpec(r=2))
    losses, weights = run_ranks(train, 1, case)[0]
    others, found = run_ranks(train, 2, Case(3, family="lfm2", lora=LoraSpec(r=2)))[0]
    np.testing.assert_allclose(others, losses, rtol=TOLERANCE)
    assert distance(found, weights) < TOLERANCE
    assert not [name for name in weights if "conv.conv" in name and "lora" in name]
