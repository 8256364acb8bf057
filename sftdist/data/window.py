"""The conversations of a planning window, and how they make packs and steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftdist.data.mixture import Floats, Ints


@dataclass(frozen=True)
class Conversations:
    """Columns over conversations: `source` int16, `index` int64 into its table, `length` int64 tokens,
    `mass` float64 weight over targets as the mixture counts it, `age` int64 windows it was left over in."""

    source: NDArray[np.int16]
    index: Ints
    length: Ints
    mass: Floats
    age: Ints

    def take(self, which: Ints | slice | NDArray[np.bool_]) -> Conversations:
        return Conversations(
            self.source[which], self.index[which], self.length[which], self.mass[which], self.age[which]
        )


class Window:
    """The steps of a window: conversations in the order of their packs, and how many make a pack and a step."""

    def __init__(self) -> None:
        self.parts: list[Conversations] = []
        self.sizes: list[Ints] = []
        self.packs_of_step: list[int] = []

    def add(self, pool: Conversations, pack: Ints, packs_of_step: list[int]) -> None:
        """Add steps: `pack` int64 numbers the packs of these steps from 0, -1: not in them."""
        placed = np.flatnonzero(pack >= 0)
        placed = placed[pack[placed].argsort(kind="stable")]
        sizes = np.bincount(pack[placed], minlength=sum(packs_of_step))
        first = np.concatenate([[0], np.cumsum(packs_of_step)[:-1]])
        self.parts.append(pool.take(placed))
        self.sizes.append(sizes[sizes > 0])
        self.packs_of_step += np.add.reduceat((sizes > 0).astype(np.int64), first).tolist()

    def packs(self, first_step: int, steps: int) -> Iterator[list[Conversations]]:
        """The packs of each step from `first_step` on."""
        sizes = np.concatenate(self.sizes)
        ends = np.cumsum(sizes)
        done = 0
        for step, number in enumerate(self.packs_of_step[:steps]):
            if step >= first_step:
                inside = range(done, done + number)
                yield [self._rows(int(ends[p] - sizes[p]), int(ends[p])) for p in inside]
            done += number

    def _rows(self, start: int, stop: int) -> Conversations:
        """Conversations by place; a pack never lies in two parts."""
        for part in self.parts:
            if start < len(part.index):
                return part.take(slice(start, stop))
            start, stop = start - len(part.index), stop - len(part.index)
        raise IndexError(start)

    def first(self, steps: int) -> Iterator[Conversations]:
        """The conversations of the first steps, part by part."""
        left = int(np.concatenate(self.sizes)[: sum(self.packs_of_step[:steps])].sum()) if steps else 0
        for part in self.parts:
            yield part.take(slice(0, min(left, len(part.index))))
            left = max(0, left - len(part.index))
