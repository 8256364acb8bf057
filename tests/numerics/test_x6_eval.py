"""X6: the evaluation loss depends neither on the size of the packs, nor on packing, nor on the number of ranks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from sftdist.core.distributed import World
from sftdist.evals.loss import evaluate_loss, evaluation_packs
from sftdist.model.loss import LossModel, LossOutput
from tests.models import tiny_model
from tests.packed import IGNORED, Row, alone, random_row
from tests.ranks import run_ranks

TOLERANCE = 1e-6
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SOURCES = ["domain", "general", "format"]
LENGTHS = [31, 5, 12, 40, 2, 17, 23]  # 7 rows: 4 ranks do not divide them
SUPERVISED = [0.9, 0.2, 0.6, 0.1, 0.9, 0.5, 0.3]  # a mean of means would show
Setting = tuple[int, bool]  # tokens in a pack, packing
Result = dict[Setting, dict[str, float]]
SETTINGS: list[Setting] = [(1, False), (40, True), (64, True), (1000, True)]


def documents() -> list[Row]:
    """Seven rows of three sources, each a row of its own."""
    rows = [random_row([length], seed=n, supervised=SUPERVISED[n]) for n, length in enumerate(LENGTHS)]
    return [Row(r.ids, r.targets, r.positions, r.cu_seqlens, torch.tensor([n % 3])) for n, r in enumerate(rows)]


def join(rows: list[Row]) -> Row:
    """One packed row; without rows the empty pack: one token, no target."""
    if not rows:
        zero = torch.zeros(1, dtype=torch.int64)
        return Row(zero, zero + IGNORED, zero, torch.tensor([0, 1], dtype=torch.int32), zero)
    bounds = torch.tensor([0] + [len(row.ids) for row in rows]).cumsum(0, dtype=torch.int32)
    parts = zip(*((row.ids, row.targets, row.positions, row.source) for row in rows), strict=True)
    ids, targets, positions, source = (torch.cat(part) for part in parts)
    return Row(ids, targets, positions, bounds, source)


@cache
def model() -> LossModel:
    return LossModel(tiny_model("llama"), num_sources=len(SOURCES), chunk=16)


@torch.no_grad()
def forward(row: Row) -> LossOutput:
    output: LossOutput = model()(**row.fields())
    return output


def evaluate(world: World) -> Result:
    rows = documents()
    results = {}
    for tokens, packing in SETTINGS:
        packs = evaluation_packs(np.array(LENGTHS), tokens, world.size, packing=packing)[world.rank]
        batches = [join([rows[index] for index in pack]) for pack in packs]
        figures = evaluate_loss(forward, batches, world, SOURCES)
        assert figures is not None
        results[tokens, packing] = figures
    return results


def evaluate_until_stopped(world: World) -> tuple[int, bool]:
    """Only rank 1 is asked to stop, after its second batch; how many batches this rank ran, and whether it left."""
    ran: list[Row] = []

    def counted(row: Row) -> LossOutput:
        ran.append(row)
        return forward(row)

    packs = evaluation_packs(np.array(LENGTHS), 1, world.size, packing=False)[world.rank]
    batches = [join([documents()[index] for index in pack]) for pack in packs]
    assert len(batches) == 4
    figures = evaluate_loss(counted, batches, world, SOURCES, stop=lambda: world.rank == 1 and len(ran) == 2)
    return len(ran), figures is None


def evaluate_by_means(world: World) -> Result:
    """The wrong variant that many trainers have: the mean of the batches' means, then the mean over the ranks."""
    rows = documents()
    results = {}
    for tokens, packing in SETTINGS:
        packs = evaluation_packs(np.array(LENGTHS), tokens, world.size, packing=packing)[world.rank]
        outputs = [forward(join([rows[index] for index in pack])) for pack in packs]
        means = torch.stack([output.sum / output.counts.sum().clamp_min(1) for output in outputs])
        total = world.all_reduce_sum(means.double().mean()) / world.size
        results[tokens, packing] = {"eval/loss": float(total)}
    return results


@cache
@torch.no_grad()
def truth() -> dict[str, float]:
    """Each row alone through transformers' own eager attention; sums in Python."""
    sums, counts = dict.fromkeys(SOURCES, 0.0), dict.fromkeys(SOURCES, 0)
    for index, row in enumerate(documents()):
        loss, count = alone(tiny_model("llama"), row)
        sums[SOURCES[index % 3]] += float(loss)
        counts[SOURCES[index % 3]] += count
    assert min(counts.values()) > 0
    total = {"eval/loss": sum(sums.values()) / sum(counts.values())}
    return total | {f"eval/loss/{name}": sums[name] / counts[name] for name in SOURCES}


def worst_error(results: list[Result]) -> float:
    expected = truth()
    figures = [(figure, expected[name]) for rank in results for line in rank.values() for name, figure in line.items()]
    return max(abs(figure / right - 1) for figure, right in figures)


def both(world: World) -> tuple[Result, Result]:
    return evaluate(world), evaluate_by_means(world)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_loss_is_the_same_for_packs_and_ranks_and_a_mean_of_means_is_not(world_size: int) -> None:
    results = [both(ALONE)] if world_size == 1 else run_ranks(both, world_size)
    right, wrong = [rank[0] for rank in results], [rank[1] for rank in results]
    assert all(set(line) == set(truth()) for rank in right for line in rank.values())
    assert all(rank == right[0] for rank in right)
    assert worst_error(right) < TOLERANCE
    assert worst_error(wrong) > 1_000 * TOLERANCE


def test_all_ranks_leave_an_evaluation_when_one_is_asked_to_stop() -> None:
    assert run_ranks(evaluate_until_stopped, 2) == [(2, True), (2, True)]
