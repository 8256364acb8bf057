"""A step whose loss or gradient is not finite: every rank names the same layer, pack and rows (S13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sftdist.core.distributed import World
from sftdist.core.errors import TrainingError
from sftdist.data.loader import Step
from sftdist.model.lora import LoraSpec
from sftdist.model.loss import LossModel
from sftdist.training.engine import Engine
from sftdist.training.layer_watch import LayerWatch
from sftdist.training.loop import Flags, NonFinite, update
from sftdist.training.non_finite import explained, first_non_finite
from sftdist.training.zero_config import EngineSpec
from tests.ranks import run_ranks
from tests.training_cases import NO_PERSISTENCE, Case, denominator, make_module, pack, step_of

RARE = 7  # a token that only one row has
LORA = LoraSpec(r=4, alpha=8, target=["q_proj", "v_proj"])


class Spoiled(torch.autograd.Function):
    """The identity whose gradient is none."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


def nan_in_a_layer(module: LossModel) -> None:
    with torch.no_grad():
        module.get_parameter(_inside(module, "model.layers.1.mlp.up_proj") + ".weight")[0, 0] = math.nan


def nan_for_a_token(module: LossModel) -> None:
    with torch.no_grad():
        module.get_parameter(_inside(module, "model.embed_tokens") + ".weight")[RARE] = math.inf


def nan_in_the_backward(module: LossModel) -> None:
    layer = module.get_submodule(_inside(module, "model.layers.0.mlp"))
    layer.register_forward_hook(lambda part, inputs, output: Spoiled.apply(output))


def nothing(module: LossModel) -> None:
    """A sound model."""


PLANTED: dict[str, Callable[[LossModel], None]] = {
    "layer": nan_in_a_layer,
    "token": nan_for_a_token,
    "backward": nan_in_the_backward,
}
CASES = {
    **{
        f"ZeRO {stage} {precision}": Case(stage, precision, "llama")
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    },
    "recomputed": Case(2, "bf16", "llama", checkpointing=True),
    "LoRA": Case(0, "bf16", "llama", lora=LORA),
    "LoRA ZeRO 3": Case(3, "bf16", "llama", lora=LORA),
}


def _inside(module: LossModel, name: str) -> str:
    return next(full for full, _ in module.named_modules() if full.endswith(name))


def packs(world: World) -> Step:
    """Two packs of three rows on each rank; the rare token is in the middle row of the last rank's second pack."""
    both = []
    for number in range(2 * world.size):
        batch = replace(pack([7, 20, 5], seed=number), row_ids=[f"row-{number}-{at}" for at in range(3)])
        batch.ids[batch.ids == RARE] = RARE + 1
        batch.targets[batch.targets == RARE] = RARE + 1
        both.append(batch)
    both[-1].ids[12] = RARE
    mine = both[world.rank :: world.size]
    return replace(step_of(mine), denominator=denominator(both))


def engine_of(case: Case, world: World, plant: Callable[[LossModel], None]) -> Engine:
    module = make_module(case)
    plant(module)
    extra = NO_PERSISTENCE if case.stage else {}
    return Engine(module, case.optimizer, EngineSpec(stage=case.stage, precision=case.precision, extra=extra), world)


def failing(world: World) -> dict[tuple[str, str], str]:
    """The error of each case with each fault."""
    told = {}
    step = packs(world)
    for name, case in CASES.items():
        for fault, plant in PLANTED.items():
            engine = engine_of(case, world, plant)
            with pytest.raises(NonFinite) as caught:
                update(engine, step, world, 1e-3, Flags)
            error = explained(caught.value, engine, world, Path("runs/a b"))
            assert isinstance(error, TrainingError)
            told[name, fault] = str(error)
            engine.close()
    return told


def test_layer_pack_and_rows_are_named_on_every_rank() -> None:
    first, second = run_ranks(failing, 2)
    assert first == second
    for (name, fault), text in first.items():
        assert "sftdist train replay='runs/a b' step=1\n" in text, name
        if fault == "layer":
            assert "in the output of model.layers.1.mlp.up_proj: pack 1 of rank 0, rows row-0-0" in text, (name, text)
        elif fault == "token":
            assert "in the output of model.embed_tokens: pack 2 of rank 1, row row-3-1." in text, (name, text)
        else:
            assert "in the backward, in the gradient of model.layers.0." in text, (name, text)


def sound(world: World) -> tuple[str, int, int, list[float]]:
    step = packs(world)
    engine = engine_of(Case(0), world, nothing)

    def hooks() -> int:
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in engine.module.modules())

    before = hooks()
    words = first_non_finite(engine, step, world)
    with LayerWatch(engine.module) as watch:
        inside = hooks()
        for batch in step.micro:
            engine.forward_backward(batch, scale=1.0, last=False)
    norms = watch.norms()
    assert [one.name for one in norms] == [
        "model.embed_tokens",
        *(f"model.layers.{at}" for at in range(len(norms) - 2)),
        "head and loss",
    ]
    assert hooks() == before < inside
    return words, before, inside, [one.activation for one in norms]


def test_what_cannot_be_found_again_is_said_and_no_hook_stays() -> None:
    [(words, _, _, activations)] = run_ranks(sound, 1)
    assert words.startswith("Run once more, every value of these packs was finite")
    assert all(math.isfinite(value) and value > 0 for value in activations)
