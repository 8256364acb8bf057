"""Evaluation loss: Σ loss over Σ weight of unique rows, in total and per source; one division at the very end.

Nothing is averaged on the way, so the figure depends neither on the size of the packs, nor on packing, nor on the
number of ranks (X6). Only sums are kept: memory does not grow with the number of rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch

from sftdist.core.distributed import World
from sftdist.core.errors import DataError
from sftdist.model.loss import LossOutput

BatchType = TypeVar("BatchType")
Pack = list[int]  # positions in `lengths`; an empty pack has no row and joins the collectives


def evaluate_loss(
    forward: Callable[[BatchType], LossOutput],
    batches: Iterable[BatchType],
    world: World,
    sources: Sequence[str],
    stop: Callable[[], bool] | None = None,
) -> dict[str, float] | None:
    """`eval/loss`, and `eval/loss/<source>` for each source that has a target; None where it was stopped.

    `forward` gives the sums of one batch without a graph. Every rank calls this with the same number of batches
    (`evaluation_packs`), also a rank that has no row. `stop` says whether this rank was asked to stop: before each
    batch the ranks compare notes, and where any was asked, all of them leave. Raises DataError where nothing is
    supervised.
    """
    sums = torch.zeros(2, len(sources), dtype=torch.float64, device=world.device)
    for batch in batches:
        world.progress.note("evaluating")
        if stop is not None and world.all_reduce_max(float(stop())) > 0:
            return None
        output = forward(batch)
        sums += torch.stack([output.per_source, output.counts])[:, : len(sources)].to(sums)
    losses, weights = world.all_reduce_sum(sums).tolist()
    if sum(weights) <= 0:
        raise DataError(
            "evaluation: no token of the evaluation rows is supervised, but a loss needs at least one; "
            "give rows with an answer, or set eval.every_steps=0"
        )
    per_source = {
        f"eval/loss/{name}": loss / weight
        for name, loss, weight in zip(sources, losses, weights, strict=True)
        if weight > 0
    }
    return {"eval/loss": sum(losses) / sum(weights), **per_source}


def evaluation_packs(
    lengths: np.ndarray, pack_tokens: int, world_size: int, *, packing: bool = True
) -> list[list[Pack]]:
    """The packs of each rank: every row once, the same number of packs on every rank, some of them empty.

    `lengths`: int [N], tokens per row. Packs hold at most `pack_tokens` tokens, a longer row is a pack of its own;
    without `packing` every row is. Packs of similar size are run at the same time.
    """
    longest_first = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    packs = best_fit(longest_first, lengths, pack_tokens) if packing else [[row] for row in longest_first]
    packs += [[] for _ in range(-len(packs) % world_size)]
    return [packs[rank::world_size] for rank in range(world_size)]


def best_fit(rows: Sequence[int], lengths: np.ndarray, pack_tokens: int) -> list[Pack]:
    """Each row goes to the pack that it fills best, or opens a new one."""
    packs: list[Pack] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for row in rows:
        length = int(lengths[row])
        place = bisect_left(spaces, (length, -1))
        if place == len(spaces):
            free, pack = pack_tokens, len(packs)
            packs.append([])
        else:
            free, pack = spaces.pop(place)
        packs[pack].append(row)
        if free > length:
            insort(spaces, (free - length, pack))
    return packs
