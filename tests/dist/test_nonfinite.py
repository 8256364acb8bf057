"""A gradient that is not finite stops every rank before the update, at every stage (S13)."""

from __future__ import annotations

import math

import pytest

from sftdist.core.distributed import World
from sftdist.core.errors import TrainingError
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, Case, Weights, distance, make_engine, packs_of, train_step, weights_of

CASES = [Case(stage, precision, optimizer=ADAMW) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
Outcome = tuple[str, Weights, Weights]


def poisoned(world: World, bad: float) -> list[Outcome]:
    """Per case: one good step, then one where the last rank alone scales its loss by `bad`."""
    outcomes = []
    for case in CASES:
        engine = make_engine(case, world)
        train_step(engine, world, packs_of(0), 1e-3)
        before, message = weights_of(engine), ""
        try:
            train_step(engine, world, packs_of(1), 1e-3, lambda *_: bad if world.rank == world.size - 1 else 0.01)
        except TrainingError as error:
            message = str(error)
        outcomes.append((message, before, weights_of(engine)))
        engine.close()
    return outcomes


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.long)])
def test_every_rank_stops_and_no_weight_changes(bad: float) -> None:
    for rank in run_ranks(poisoned, 2, bad):
        for case, (message, before, after) in zip(CASES, rank, strict=True):
            assert "step 2: the gradient norm is" in message, f"ZeRO {case.stage} {case.precision} did not stop"
            assert distance(after, before) == 0.0
            assert all(math.isfinite(value.sum()) for value in after.values())
