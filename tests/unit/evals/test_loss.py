"""Evaluation packs hold every row once on any number of ranks; the loss is one division of sums."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftdist.core.distributed import World
from sftdist.core.errors import DataError
from sftdist.evals.loss import evaluate_loss, evaluation_packs
from sftdist.model.loss import LossOutput

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    pack_tokens=st.integers(1, 80),
    world_size=st.integers(1, 8),
    packing=st.booleans(),
)
def test_every_row_once_and_as_many_packs_on_each_rank(
    lengths: list[int], pack_tokens: int, world_size: int, packing: bool
) -> None:
    ranks = evaluation_packs(np.array(lengths, dtype=np.int32), pack_tokens, world_size, packing=packing)
    packs = [pack for rank in ranks for pack in rank]
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1
    assert sum(pack == [] for pack in packs) < world_size
    for pack in packs:
        assert len(pack) <= 1 or (packing and sum(lengths[row] for row in pack) <= pack_tokens)
    alone = [pack for rank in evaluation_packs(np.array(lengths), pack_tokens, 1, packing=packing) for pack in rank]
    assert sorted(map(tuple, filter(None, packs))) == sorted(map(tuple, alone))


def test_best_fit_fills_packs_in_good_time() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 100_000).clip(8, 2048).astype(np.int32)
    began = time.perf_counter()
    (packs,) = evaluation_packs(lengths, 2048, 1)
    assert time.perf_counter() - began < 5
    assert lengths.sum() / (2048 * len(packs)) > 0.99


def output(losses: list[float], weights: list[float]) -> LossOutput:
    sums = torch.tensor(losses)
    return LossOutput(sum=sums.sum(), per_source=sums, counts=torch.tensor(weights))


def test_loss_is_one_division_and_an_absent_source_has_none() -> None:
    batches = [output([6.0, 1.0, 0.0], [2.0, 1.0, 0.0]), output([2.0, 0.0, 0.0], [6.0, 0.0, 0.0])]
    result = evaluate_loss(lambda batch: batch, batches, ALONE, ["a", "b", "c"])
    assert result == {"eval/loss": 1.0, "eval/loss/a": 1.0, "eval/loss/b": 1.0}


def test_nothing_supervised_is_refused() -> None:
    with pytest.raises(DataError, match=r"no token .* is supervised.*eval\.every_steps=0"):
        evaluate_loss(lambda batch: batch, [output([0.0], [0.0])], ALONE, ["a"])


def test_a_stop_ends_the_evaluation_before_the_next_batch() -> None:
    seen: list[LossOutput] = []

    def forward(batch: LossOutput) -> LossOutput:
        seen.append(batch)
        return batch

    batches = [output([6.0], [2.0])] * 5
    assert evaluate_loss(forward, batches, ALONE, ["a"], stop=lambda: len(seen) == 2) is None
    assert len(seen) == 2
    assert evaluate_loss(forward, batches, ALONE, ["a"], stop=lambda: False) == {"eval/loss": 3.0, "eval/loss/a": 3.0}


def test_a_watcher_sees_each_batch() -> None:
    before = ALONE.progress.now.count
    evaluate_loss(lambda batch: batch, [output([6.0], [2.0])] * 5, ALONE, ["a"])
    assert (ALONE.progress.now.phase, ALONE.progress.now.count) == ("evaluating", before + 5)
