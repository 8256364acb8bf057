"""The engine on CUDA: every ZeRO stage and precision on one GPU, against the plain loop on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sftdist.core.distributed import World
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.engine import StepOutcome
from sftdist.training.retention import Keep
from tests.ranks import run_ranks
from tests.training_cases import (
    ADAMW,
    Case,
    Run,
    Weights,
    distance,
    flat,
    make_engine,
    make_module,
    packs_of,
    reference_run,
    train_case,
    train_step,
    weights_in,
    weights_of,
)

pytestmark = pytest.mark.gpu
STAGES = (0, 1, 2, 3)


def run_stages(world: World, case: Case) -> list[Run]:
    assert world.device.type == "cuda"
    return [train_case(world, replace(case, stage=stage)) for stage in STAGES]


def test_fp32_steps_equal_the_plain_loop() -> None:
    expected = reference_run(Case(0))
    for run in run_ranks(run_stages, 1, Case(0))[0]:
        assert run.losses == pytest.approx(expected.losses, rel=1e-5)
        assert run.norms == pytest.approx(expected.norms, rel=1e-4)
        assert distance(run.weights, expected.weights) < 1e-5


def test_bf16_first_update_is_the_same_at_every_stage() -> None:
    case = Case(0, "bf16", optimizer=ADAMW, lrs=(1e-3,))
    before = flat(weights_in(make_module(case)))
    updates = [flat(run.weights) - before for run in run_ranks(run_stages, 1, case)[0]]
    for update in updates[1:]:
        assert np.linalg.norm(update - updates[0]) < 0.01 * np.linalg.norm(updates[0])


def fp16_runs(world: World) -> list[tuple[list[StepOutcome], Weights]]:
    """One update per stage; every overflow before it halves the loss scale and runs the same packs again."""
    runs = []
    for stage in STAGES:
        engine = make_engine(Case(stage, "fp16", optimizer=ADAMW), world)
        outcomes = [train_step(engine, world, packs_of(0), 1e-3)[1]]
        while not outcomes[-1].applied:
            outcomes.append(train_step(engine, world, packs_of(0), 1e-3)[1])
        runs.append((outcomes, weights_of(engine)))
        engine.close()
    return runs


def test_fp16_takes_the_same_scales_and_step_at_every_stage() -> None:
    runs = run_ranks(fp16_runs, 1)[0]
    scales = [[outcome.loss_scale for outcome in outcomes] for outcomes, _ in runs]
    assert all(other == scales[0] for other in scales)
    assert all(distance(weights, runs[0][1]) < 1e-4 for _, weights in runs)


def resumed(world: World, folder: str) -> list[tuple[float, float]]:
    """Per stage: the loss of step 3, uninterrupted and resumed after step 2."""
    losses = []
    for stage in STAGES:
        checkpoints = Checkpoints(Path(folder) / str(stage), Keep(1))
        case = Case(stage, "bf16", optimizer=ADAMW)
        engine = make_engine(case, world)
        for step in range(2):
            train_step(engine, world, packs_of(step), 1e-3)
        checkpoints.save(engine, {}, 2)
        plain, _ = train_step(engine, world, packs_of(2), 1e-3)
        engine.close()
        engine = make_engine(case, world)
        assert checkpoints.load_latest(engine) is not None
        again, _ = train_step(engine, world, packs_of(2), 1e-3)
        engine.close()
        losses.append((plain, again))
    return losses


def test_resume(tmp_path: Path) -> None:
    for plain, again in run_ranks(resumed, 1, str(tmp_path))[0]:
        assert again == pytest.approx(plain, rel=1e-6)


def probe_memory(world: World) -> tuple[int, int]:
    """Bytes of a probe, and of the real step that follows, at their peaks."""
    engine = make_engine(Case(2, "bf16", optimizer=ADAMW), world)
    peaks = []
    for work in (
        lambda: engine.probe(packs_of(0)[0]),
        lambda: engine.forward_backward(packs_of(0)[0], scale=0.01, last=True),
    ):
        torch.cuda.reset_peak_memory_stats()
        work()
        peaks.append(torch.cuda.max_memory_allocated())
    return peaks[0], peaks[1]


def test_probe_needs_the_memory_of_a_step() -> None:
    probed, real = run_ranks(probe_memory, 1)[0]
    assert probed == pytest.approx(real, rel=0.2)
