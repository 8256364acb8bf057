"""The start-up checks of the model on a real engine: they run on ZeRO-3 partitions and leave the training as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sftdist.core.distributed import World
from sftdist.model.backends.sdpa import BACKEND
from sftdist.model.checks import check_isolation, check_logits, check_parity
from tests.models import MIXTURES_OF_EXPERTS, VOCABULARY
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, Case, make_engine, packs_of, train_step


def losses_with_and_without(world: World, cases: Sequence[Case]) -> list[tuple[list[float], list[float]]]:
    return [(losses(world, case, checked=False), losses(world, case, checked=True)) for case in cases]


def losses(world: World, case: Case, *, checked: bool) -> list[float]:
    engine = make_engine(case, world)
    if checked:
        model = engine.module.model
        isolation = check_isolation(model, VOCABULARY, world.device)
        assert isolation is not None
        assert isolation.exact or case.family in MIXTURES_OF_EXPERTS
        assert check_parity(model, BACKEND, VOCABULARY, world.device, longest=64).layers == 2
        check_logits(model, VOCABULARY, world.device)
    result = []
    for step, lr in enumerate(case.lrs):
        loss, outcome = train_step(engine, world, packs_of(step, 4), lr)
        result += [loss, outcome.grad_norm]
    engine.close()
    return result


def test_a_run_with_the_checks_is_bit_equal_to_one_without() -> None:
    plain = Case(0, optimizer=ADAMW, lrs=(1e-2, 1e-2))
    cases = [replace(plain, stage=stage, precision=precision) for stage, precision in ((0, "fp32"), (2, "bf16"))]
    cases += [replace(plain, stage=3, family="gpt_oss"), replace(plain, stage=3, family="gemma2", precision="bf16")]
    for ranks in run_ranks(losses_with_and_without, 2, cases):
        for without, checked in ranks:
            assert checked == without
