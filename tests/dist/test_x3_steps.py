"""X3, S3, S4: one optimizer step is the same for every world size, ZeRO stage and number of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sftdist.core.distributed import World
from sftdist.data.loader import Batch
from sftdist.training.engine import Engine
from tests.ranks import run_ranks
from tests.training_cases import (
    ADAMW,
    Case,
    Run,
    denominator,
    distance,
    flat,
    make_engine,
    make_module,
    packs_of,
    reference_run,
    train_case,
    train_step,
    weights_in,
)

STAGES = (0, 1, 2, 3)
GRADIENT = Case(0, lrs=(1.0,), max_grad_norm=0.0)  # the weights move by the gradient itself


def cases(family: str) -> list[Case]:
    """Per stage: three clipped steps of SGD with momentum, one step by the gradient, three of AdamW; and offload."""
    offloaded = [Case(stage, family=family, offload="optimizer") for stage in (2, 3)]
    return offloaded + [
        case
        for stage in STAGES
        for case in (
            Case(stage, family=family),
            Case(stage, family=family, lrs=GRADIENT.lrs, max_grad_norm=0.0),
            Case(stage, family=family, optimizer=ADAMW, lrs=(1e-3, 1e-3, 1e-3)),
        )
    ]


def run_cases(world: World, todo: Sequence[Case]) -> list[Run]:
    return [train_case(world, case) for case in todo]


@pytest.mark.parametrize(("world_size", "family"), [(1, "llama_tied"), (2, "llama_tied"), (2, "llama"), (4, "llama")])
def test_steps_equal_the_plain_loop(world_size: int, family: str) -> None:
    todo = cases(family)
    for ranks in zip(*run_ranks(run_cases, world_size, todo), strict=True):
        case = todo.pop(0)
        assert_equal(case, ranks[0])
        for other in ranks[1:]:
            assert distance(other.weights, ranks[0].weights) == 0.0, "the ranks hold different weights"


def assert_equal(case: Case, run: Run) -> None:
    """The measures of X3."""
    expected = reference_run(case)
    assert run.losses == pytest.approx(expected.losses, rel=1e-4 if case.optimizer is ADAMW else 1e-5)
    assert run.norms == pytest.approx(expected.norms, rel=1e-3 if case.optimizer is ADAMW else 1e-5)
    if case.max_grad_norm == 0.0:
        assert gradient_error(case, run, expected) < 1e-5
    elif case.optimizer is not ADAMW:
        assert distance(run.weights, expected.weights) < 1e-6


def gradient_error(case: Case, run: Run, expected: Run) -> float:
    before = flat(weights_in(make_module(case)))
    gradient, wanted = before - flat(run.weights), before - flat(expected.weights)
    return float(np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted))


def mean_of_means(batch: Batch, mine: Sequence[Batch], total: float, world_size: int) -> float:
    return 1.0 / (max(1.0, denominator([batch])) * len(mine))


def divided_by_micro_batches(batch: Batch, mine: Sequence[Batch], total: float, world_size: int) -> float:
    return world_size / total / len(mine)


def without_world_size(batch: Batch, mine: Sequence[Batch], total: float, world_size: int) -> float:
    return 1.0 / total


WRONG = (mean_of_means, divided_by_micro_batches, without_world_size)


def run_wrong(world: World) -> list[Run]:
    return [train_case(world, GRADIENT, scale) for scale in WRONG]


def test_wrong_scales_are_rejected() -> None:
    """Wrong variants, each seen to fail the measures above by far."""
    for run in run_ranks(run_wrong, 2)[0]:
        assert gradient_error(GRADIENT, run, reference_run(GRADIENT)) > 0.1
        with pytest.raises(AssertionError):
            assert_equal(GRADIENT, run)


def persistent(engine: Engine) -> list[bool]:
    parameters: list[Any] = list(engine.module.parameters())
    return [bool(parameter.ds_persist) for parameter in parameters]


def persistence(world: World) -> tuple[list[bool], list[bool]]:
    """Whether each parameter is persistent: with our threshold of 0, and with DeepSpeed's default."""
    engine = make_engine(Case(3), world)
    train_step(engine, world, packs_of(0), 0.1)
    ours = persistent(engine)
    engine.close()
    module = make_module(Case(3))
    engine = Engine(module, Case(3).optimizer, type(engine.spec)(stage=3, precision="fp32"), world)
    default = persistent(engine)
    engine.close()
    return ours, default


def test_zero_3_partitions_every_parameter() -> None:
    """With DeepSpeed's default threshold a tiny model is never partitioned, and ZeRO 3 would go untested."""
    ours, default = run_ranks(persistence, 2)[0]
    assert not any(ours)
    assert all(default)
