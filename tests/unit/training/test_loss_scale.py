"""fp16's dynamic loss scale: an overflow halves it and leaves the weights; at its floor the run stops."""

from __future__ import annotations

import math

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.core.errors import TrainingError
from sftdist.training.engine import LossScale
from tests.training_cases import ADAMW, Case, distance, make_engine, packs_of, train_case, train_step, weights_of

ALONE = World(0, 1, 0, torch.device("cpu"))
CASE = Case(0, "fp16", optimizer=ADAMW, lrs=(1e-3,))


def test_scale_halves_and_doubles() -> None:
    scale = LossScale(value=8.0, window=2)
    scale.update(overflow=True)
    assert scale.value == 4.0
    for expected in (4.0, 8.0, 8.0, 16.0):
        scale.update(overflow=False)
        assert scale.value == expected


def test_an_overflow_leaves_the_weights_and_the_same_packs_run_again() -> None:
    engine = make_engine(CASE, ALONE)
    before, scales = weights_of(engine), []
    while True:
        _, outcome = train_step(engine, ALONE, packs_of(0), 1e-3)
        scales.append(outcome.loss_scale)
        if outcome.applied:
            break
        assert distance(weights_of(engine), before) == 0.0
        assert engine.updates == 0
    assert scales == [2.0**16 / 2**n for n in range(len(scales))]
    assert len(scales) > 1, "this case must overflow at the first scale, or it shows nothing"
    bf16 = train_case(ALONE, Case(0, "fp32", optimizer=ADAMW, lrs=(1e-3,)))
    assert outcome.grad_norm == pytest.approx(bf16.norms[0], rel=1e-2)


def test_at_the_floor_the_run_stops() -> None:
    engine = make_engine(CASE, ALONE)
    before = weights_of(engine)
    for _ in range(16):
        assert not train_step(engine, ALONE, packs_of(0), 1e-3, lambda *_: math.nan)[1].applied
    with pytest.raises(TrainingError, match="step 1: the gradient norm is nan"):
        train_step(engine, ALONE, packs_of(0), 1e-3, lambda *_: math.nan)
    assert distance(weights_of(engine), before) == 0.0
