"""A few rows by heart: a sound setup gets there, and each planted fault is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sftdist.core.distributed import World
from sftdist.core.settings import TrainJobConfig
from sftdist.data.loader import Document
from sftdist.model.own_loss import rows_of
from sftdist.training.engine import Engine
from sftdist.training.overfit import Cause, Facts, causes_of, floor_of, overfit, overfit_issues, step_of_rows, verdict
from sftdist.training.zero_config import EngineSpec
from tests.models import VOCABULARY
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, Case, make_module

PACK = 64
SOUND = Case(stage=0, optimizer=ADAMW, max_grad_norm=1.0)


def documents(count: int = 4, length: int = 12, supervised: int = 6) -> list[Document]:
    """Rows of random tokens; the last few of each are targets."""
    draw = np.random.default_rng(0)
    weights = np.zeros(length, np.float32)
    weights[length - supervised :] = 1.0
    return [
        Document(draw.integers(3, VOCABULARY, length).astype(np.int32), weights, 0, f"train/row-{number}")
        for number in range(count)
    ]


def contradicting() -> list[Document]:
    """Two of the rows have one prompt and two answers."""
    first, second, *rest = documents()
    ids = np.concatenate([first.ids[:6], second.ids[6:]])
    return [first, Document(ids, second.weights, 0, second.row_id), *rest]


def zero_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss of the user's own that does not depend on the model."""
    return logits.float().sum(-1) * 0.0 + 3.0


def tried(world: World, plant: str, lr: float, rows: list[Document]) -> Facts:
    """A training with the planted fault."""
    module = make_module(SOUND)
    if plant == "norms alone":
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.endswith("input_layernorm.weight"))
    if plant == "loss":
        module.head_loss.row_losses = rows_of(zero_loss)
    engine = Engine(module, SOUND.optimizer, EngineSpec(stage=0, precision="fp32", max_grad_norm=1.0), world)
    return overfit(engine, rows, PACK, lr, lambda: False, lambda line: None)


def found(plant: str, lr: float, rows: list[Document], ranks: int = 1) -> tuple[Facts, list[Cause]]:
    facts = run_ranks(tried, ranks, plant, lr, rows)
    assert all(one.losses == pytest.approx(facts[0].losses, nan_ok=True) for one in facts)
    return facts[0], [cause for cause, _ in causes_of(facts[0])]


def test_a_sound_setup_gets_there() -> None:
    facts, causes = found("", 1e-2, documents())
    assert causes == []
    assert facts.reached
    assert facts.losses[0] > 4 > 0.05 >= facts.losses[-1]
    assert (facts.floor, facts.supervised, facts.tokens, facts.moved) == (0.0, 24, 48, facts.tensors)
    assert verdict(facts, []).startswith("overfit: the loss of 4 rows fell from")


@pytest.mark.long
def test_on_two_ranks_the_rows_are_the_same() -> None:
    facts, causes = found("", 1e-2, documents(5), ranks=2)
    alone, _ = found("", 1e-2, documents(5))
    assert causes == []
    assert facts.losses[:5] == pytest.approx(alone.losses[:5], rel=1e-4)


FAULTS: dict[str, tuple[str, float, Callable[[], list[Document]], Cause, str]] = {
    "the rate is too low": ("", 1e-6, documents, Cause.RATE_LOW, "optimizer.lr=1e-06 is too low; try 1e-05"),
    "the rate is too high": ("", 3.0, documents, Cause.RATE_HIGH, "optimizer.lr=3 is too high; try 0.3"),
    "nothing moves": ("", 0.0, documents, Cause.FROZEN, "no weight has changed"),
    "nearly all is frozen": ("norms alone", 1e-3, documents, Cause.FEW_PARAMETERS, "parameters train"),
    "the loss has no gradient": ("loss", 1e-2, documents, Cause.NO_GRADIENT, "every gradient is exactly 0"),
    "the mask is empty": ("", 1e-2, lambda: documents(supervised=0), Cause.MASK, "nothing is supervised: 0 of 48"),
    "the mask has one token": ("", 1e-2, lambda: documents(supervised=1), Cause.MASK, "little more than the stop"),
    "two answers to one prompt": ("", 1e-2, contradicting, Cause.CONTRADICTION, "rows train/row-0, train/row-1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    plant, lr, rows, cause, words = FAULTS[name]
    facts, causes = found(plant, lr, rows())
    assert causes == [cause], (facts.losses[:1], facts.losses[-3:])
    assert words in causes_of(facts)[0][1]
    assert f"{cause}: " in verdict(facts, causes_of(facts))


def test_what_no_model_can_reach_is_counted_exactly() -> None:
    """Of two answers with six tokens each, only the first differs for one prompt: log 2 nats, twice in 24 tokens."""
    floor, rows = floor_of(contradicting())
    assert floor == pytest.approx(2 * np.log(2) / 24)
    assert rows == ["train/row-0", "train/row-1"]
    assert floor_of(documents()) == (0.0, [])


def test_each_rank_has_as_many_packs_and_the_weight_is_that_of_all() -> None:
    worlds = [World(rank, 2, rank, torch.device("cpu")) for rank in range(2)]
    steps = [step_of_rows(documents(5), 24, world) for world in worlds]
    assert [len(step.micro) for step in steps] == [2, 2]
    assert [step.denominator for step in steps] == [30.0, 30.0]
    rows = [row for step in steps for batch in step.micro for row in batch.row_ids]
    assert sorted(rows) == sorted(steps[0].row_ids)


def test_no_row_is_refused() -> None:
    assert overfit_issues(TrainJobConfig(overfit=0)) == [
        "overfit=0: required a number of rows, from 1 (8 is a good one)"
    ]
    assert overfit_issues(TrainJobConfig(overfit=1)) == overfit_issues(TrainJobConfig()) == []
