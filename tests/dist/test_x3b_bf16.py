"""X3b: in bf16 the first AdamW update is the same over ZeRO 0-3, with masters from the float32 values (S16)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sftdist.core.distributed import World
from sftdist.training.engine import Engine
from sftdist.training.zero_config import EngineSpec
from tests.ranks import run_ranks
from tests.training_cases import (
    ADAMW,
    NO_PERSISTENCE,
    Case,
    Weights,
    distance,
    flat,
    make_engine,
    make_module,
    packs_of,
    train_case,
    train_step,
    weights_in,
    weights_of,
)

STAGES = (0, 1, 2, 3)
UPDATE = Case(0, precision="bf16", optimizer=ADAMW, lrs=(1e-3,))
MICRO_BATCHES = 32  # per rank: enough for a sum in bf16 to be seen


def update_of(weights: Weights, case: Case) -> np.ndarray:
    return flat(weights) - flat(weights_in(make_module(case)))


def difference(update: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(update - expected) / np.linalg.norm(expected))


def first_updates(world: World) -> list[Weights]:
    """The weights after one update, per stage; then with many micro-batches."""
    cases = [replace(UPDATE, stage=stage) for stage in STAGES]
    few = [train_case(world, case).weights for case in cases]
    return few + [many_micro_batches(world, case) for case in cases]


def many_micro_batches(world: World, case: Case) -> Weights:
    engine = make_engine(case, world)
    train_step(engine, world, packs_of(0, MICRO_BATCHES * world.size), 1e-3)
    weights = weights_of(engine)
    engine.close()
    return weights


def test_first_update_is_the_same_at_every_stage() -> None:
    few_and_many = run_ranks(first_updates, 2)[0]
    for weights in (few_and_many[:4], few_and_many[4:]):
        updates = [update_of(w, UPDATE) for w in weights]
        for stage in STAGES:
            assert difference(updates[stage], updates[0]) < 0.01, f"stage {stage}"


def rounded_masters(world: World) -> tuple[Weights, Weights]:
    """Masters from float32 values, and, wrongly, from the values rounded to bf16 first."""
    case = replace(UPDATE, stage=2, lrs=())
    right = train_case(world, case).weights
    module = make_module(case)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16().float()
    engine = Engine(module, ADAMW, EngineSpec(2, "bf16", extra=NO_PERSISTENCE), world)
    wrong = weights_of(engine)
    engine.close()
    return right, wrong


def test_masters_are_the_values_that_were_handed_in() -> None:
    right, wrong = run_ranks(rounded_masters, 2)[0]
    expected = weights_in(make_module(UPDATE))
    assert distance(right, expected) == 0.0
    assert distance(wrong, expected) > 1e-4


def small_updates(world: World, stage: int, precision: str) -> list[float]:
    """How far the norm weights have moved after 20 steps at a rate that bf16 weights alone could not show."""
    case = Case(stage, precision=precision, optimizer=ADAMW, lrs=(1e-6,) * 20)
    after, before = train_case(world, case).weights, weights_in(make_module(case))
    return [float(np.abs(after[name] - before[name]).max()) for name in before if "norm" in name]


@pytest.mark.parametrize("stage", [0, 2])
def test_norm_weights_move_at_a_small_rate(stage: int) -> None:
    """S16: a weight of 1.0 in bf16 has a grid of 0.004; only the float32 master can move by 1e-6."""
    moved = run_ranks(small_updates, 1, stage, "bf16")[0]
    assert all(1e-6 < distance < 1e-3 for distance in moved)
