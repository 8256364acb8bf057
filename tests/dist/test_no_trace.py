"""What start-up does with the engine leaves no trace: a run with it is bit-equal to one without (S4)."""

from __future__ import annotations

from dataclasses import replace

import torch

from sftdist.core.distributed import World
from sftdist.training.engine import Engine
from tests.ranks import run_ranks
from tests.training_cases import (
    ADAMW,
    SGD,
    Case,
    Run,
    exact_scale,
    make_engine,
    packs_of,
    train_step,
    weights_of,
)

CASES = [
    Case(stage, precision, optimizer=optimizer, lrs=(1e-2, 1e-2))
    for stage in (0, 1, 2, 3)
    for precision, optimizer in (("fp32", SGD), ("fp32", ADAMW), ("bf16", ADAMW))
]


def start_up(engine: Engine) -> None:
    """Everything that runs before step 1: memory probe, dtypes, a look at the state, an evaluation."""
    engine.probe(packs_of(7)[0])
    engine.dtypes()
    next(engine.state())
    engine.evaluate(packs_of(8)[0])


def poison(engine: Engine) -> None:
    """Wrong: a real backward without a step."""
    engine.forward_backward(packs_of(7)[0], scale=1.0, last=False)


def run(world: World, case: Case, before: str) -> Run:
    torch.manual_seed(world.rank)
    engine = make_engine(case, world)
    if before == "checks":
        start_up(engine)
    if before == "poison":
        poison(engine)
    results = [train_step(engine, world, packs_of(step), lr, exact_scale) for step, lr in enumerate(case.lrs)]
    weights = weights_of(engine)
    engine.close()
    return Run([loss for loss, _ in results], [outcome.grad_norm for _, outcome in results], weights)


def with_and_without(world: World) -> list[tuple[bool, bool]]:
    """Per case: is the run with the checks bit-equal, and is the poisoned one?"""
    verdicts = []
    for case in CASES:
        case = replace(case, changes={"attention_dropout": 0.1})
        plain = run(world, case, "nothing")
        verdicts.append((same(run(world, case, "checks"), plain), same(run(world, case, "poison"), plain)))
    return verdicts


def same(one: Run, other: Run) -> bool:
    equal = all((one.weights[name] == other.weights[name]).all() for name in other.weights)
    return equal and one.losses == other.losses and one.norms == other.norms


def test_start_up_leaves_no_trace() -> None:
    for case, (checked, poisoned) in zip(CASES, run_ranks(with_and_without, 2)[0], strict=True):
        assert checked, f"a trace at ZeRO {case.stage} {case.precision} {case.optimizer.name}"
        assert not poisoned, f"the poisoned run must differ at ZeRO {case.stage} {case.precision}"
