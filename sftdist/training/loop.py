"""The training loop: it receives built parts and callables, builds nothing, and can be read aloud."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import record_function

from sftdist.core.distributed import World
from sftdist.core.errors import TrainingError
from sftdist.data.loader import Loader, Step
from sftdist.training.engine import Engine, StepOutcome
from sftdist.training.profiling import PASSES, UPDATE


@dataclass(frozen=True)
class TrainState:
    """What a run has done so far: optimizer steps, tokens, supervised tokens and conversations of all ranks."""

    step: int = 0
    tokens: int = 0
    targets: float = 0.0
    conversations: int = 0

    def after(self, step: Step) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + step.tokens,
            targets=self.targets + step.targets,
            conversations=self.conversations + step.conversations,
        )


class NonFinite(TrainingError):
    """A loss or a gradient was not finite in `step`; every rank raises it, before the weights change."""

    def __init__(self, message: str, step: Step) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Flags:
    """What one rank has to tell all: it was asked to stop, or its part of a background save has failed."""

    stop: bool = False
    save_failed: bool = False


@dataclass(frozen=True)
class StepLosses:
    """Sums over all ranks and micro-batches of one step: Σ w·ce and Σ w per source, in float64.

    `any_rank`: the flags of all ranks, or-ed. They travel with the sums, so that a step costs one collective and one
    read from the device; at ZeRO 0 the gradient's norm comes in the same read.
    """

    sums: list[float]
    weights: list[float]
    any_rank: Flags
    data_wait_seconds: float

    def mean(self, denominator: float) -> float:
        return sum(self.sums) / denominator


@dataclass(frozen=True)
class LoopSpec:
    """`steps` is the last optimizer step; `lr_at(k)` is the rate of the k-th update, counted from 0."""

    steps: int
    lr_at: Callable[[int], float]
    save_every: int
    eval_every: int


@dataclass(frozen=True)
class StepDone:
    """One finished optimizer step: what it trained on, its losses, the update, its rate, and its wall time."""

    step: Step
    losses: StepLosses
    outcome: StepOutcome
    lr: float
    seconds: float


@dataclass(frozen=True)
class Calls:
    """What the loop calls: the flags of this rank, the rows of a step before it is tried, its figures after it, a
    checkpoint, the end of a save in the background, an evaluation (false: given up because of a stop)."""

    flags: Callable[[], Flags]
    begin: Callable[[Step], None]
    track: Callable[[TrainState, StepDone], None]
    save: Callable[[TrainState], None]
    settle: Callable[[], None]
    evaluate: Callable[[TrainState], bool]


def run_steps(
    engine: Engine, loader: Loader, world: World, spec: LoopSpec, state: TrainState, calls: Calls
) -> tuple[TrainState, bool]:
    """Run optimizer steps to `spec.steps`, or until every rank agrees to stop; returns whether it was stopped.

    Raises `NonFinite` on every rank when a loss or a gradient is not finite, before the weights change, and
    `CheckpointError` on every rank at the step after a save in the background has failed.
    """
    while state.step < spec.steps:
        started = time.perf_counter()
        world.progress.note("waiting for the packs of the next step")
        step, lr = loader.take(), spec.lr_at(state.step)
        calls.begin(step)
        losses, outcome = update(engine, step, world, lr, calls.flags)
        state = state.after(step)
        calls.track(state, StepDone(step, losses, outcome, lr, time.perf_counter() - started))
        if losses.any_rank.save_failed:
            calls.settle()
        stop, last = losses.any_rank.stop, state.step == spec.steps
        # Before any evaluation: a preempted job has little time left.
        saved = stop or last or due(spec.save_every, state.step)
        if saved:
            calls.save(state)
        if stop and not last:
            return state, True
        if evaluation_is_due(spec, state) and not calls.evaluate(state):
            if not saved:
                calls.save(state)
            return state, True
    return state, False


def update(
    engine: Engine, step: Step, world: World, lr: float, flags: Callable[[], Flags]
) -> tuple[StepLosses, StepOutcome]:
    """One optimizer step. An fp16 overflow halves the loss scale and leaves the weights: the same packs run again."""
    while True:
        with record_function(PASSES):
            losses = run_micro_batches(engine, step, world, flags)
        require_finite(losses, step)
        world.progress.note("updating the weights")
        try:
            with record_function(UPDATE):
                outcome = engine.step(lr)
        except TrainingError as error:
            raise NonFinite(str(error), step) from error
        if outcome.applied:
            return losses, outcome


def due(every: int, step: int) -> bool:
    """Every `every` steps, counted in optimizer steps; 0 means never."""
    return every > 0 and step % every == 0


def evaluation_is_due(spec: LoopSpec, state: TrainState) -> bool:
    """Every `eval_every` steps and after the last one; never without a step or with `eval_every` 0."""
    return state.step > 0 and spec.eval_every > 0 and (due(spec.eval_every, state.step) or state.step == spec.steps)


def named_rows(step: Step) -> str:
    """The rows of a step, for a message: the first ones, and where all of them are."""
    more = " ..." if len(step.row_ids) > 20 else ""
    return f"Rows of this step: {', '.join(step.row_ids[:20])}{more} (all of them in log/rows.jsonl)."


def run_micro_batches(engine: Engine, step: Step, world: World, flags: Callable[[], Flags]) -> StepLosses:
    """Forward and backward of this rank's packs; the gradient is that of Σ w·ce / denominator over all ranks."""
    scale = world.size / step.denominator
    sums: Any = 0.0
    weights: Any = 0.0
    for index, batch in enumerate(step.micro):
        world.progress.note(f"forward and backward {index + 1} of {len(step.micro)}")
        output = engine.forward_backward(batch, scale=scale, last=index == len(step.micro) - 1)
        sums = sums + output.per_source.double()
        weights = weights + output.counts.double()
    mine = flags()
    told = [float(mine.stop), float(mine.save_failed), step.data_wait_seconds]
    extra = torch.tensor(told, dtype=torch.float64).to(sums.device, non_blocking=True)
    total = engine.read(world.all_reduce_sum(torch.cat([sums, weights, extra])))
    sources = len(sums)
    stop, save_failed, waited = total[2 * sources :]
    return StepLosses(
        sums=total[:sources],
        weights=total[sources : 2 * sources],
        any_rank=Flags(stop > 0, save_failed > 0),
        data_wait_seconds=waited / world.size,
    )


def require_finite(losses: StepLosses, step: Step) -> None:
    """Every rank holds the same sums, so every rank raises or none does."""
    if not all(math.isfinite(value) for value in losses.sums):
        raise NonFinite(
            f"step {step.step + 1}: the loss is {sum(losses.sums)}, but it must be finite; no weight was changed.", step
        )
