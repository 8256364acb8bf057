"""What a replay says of rows and of a backward that is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.model.load import decoder_layers
from sftdist.training.replay import anomaly_of, row_losses
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, Case, make_engine, mixed_packs, step_of

CASE = Case(stage=0, optimizer=ADAMW)


def said_of_a_backward(world: World, broken: bool) -> str | None:
    """With a root of 0 behind the first layer: the forward is finite, its gradient is not."""
    engine = make_engine(CASE, world)
    if broken:

        def add_root(part: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output + torch.sqrt(output * 0)

        decoder_layers(engine.module.model)[0].register_forward_hook(add_root)
    return anomaly_of(engine, mixed_packs()[0])


def test_torch_names_the_backward_and_the_line_of_its_forward() -> None:
    [said] = run_ranks(said_of_a_backward, 1, True)
    assert "Function 'SqrtBackward0' returned nan values" in said
    assert "return output + torch.sqrt(output * 0)" in said
    assert run_ranks(said_of_a_backward, 1, False) == [None]


def test_each_row_has_the_mean_of_its_own_tokens() -> None:
    """The tokens' losses are their places in the pack; a pack without a target has no row."""
    packs = mixed_packs()
    rows = row_losses(step_of(packs), [batch.index.float() for batch in packs], rank=3)
    assert [(row.id, row.pack, row.supervised) for row in rows] == [
        *(("r0", 1, 6), ("r1", 1, 19), ("r2", 1, 4)),
        *(("r0", 2, 8), ("r1", 2, 11)),
        ("r0", 3, 1),
    ]
    assert rows[0].loss == pytest.approx(sum(range(6)) / 6)
    assert rows[1].loss == pytest.approx(sum(range(7, 26)) / 19)
    assert [row.worst for row in rows[:3]] == [5, 25, 30]
    assert {row.rank for row in rows} == {3}
