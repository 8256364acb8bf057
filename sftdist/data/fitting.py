"""What `data.max_len` leaves of a source, and what it costs.

A source may have 10^8 rows: they are looked at a block at a time, and of each row that stays only its number is kept.
Its length and its targets are looked up in the store's own columns, which every rank of a host shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import DataError
from sftdist.data.permutation import Ints

BLOCK = 1 << 20  # rows looked at at a time
Floats = NDArray[np.float64]
Rows = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True)
class Column:
    """A column of a store at some of its rows: looked up where it is asked for, never copied as a whole.

    `values` [store rows]; `rows` [N] rising row numbers; the rows `cut`, rising too, have the values `instead`.
    """

    values: NDArray[Any]
    rows: Rows
    cut: Rows
    instead: NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Ints | NDArray[np.bool_] | slice) -> NDArray[Any]:
        rows = self.rows[index]
        found = self.values[rows]
        if len(self.cut):
            place = np.minimum(np.searchsorted(self.cut, rows), len(self.cut) - 1)
            here = self.cut[place] == rows
            found[here] = self.instead[place[here]]
        return found


@dataclass(frozen=True)
class Amount:
    """Conversations, their tokens, and the sum of their weights over targets."""

    rows: int = 0
    tokens: int = 0
    targets: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.rows + other.rows, self.tokens + other.tokens, self.targets + other.targets)

    @classmethod
    def of(cls, lengths: NDArray[Any], targets: Floats) -> Amount:
        return cls(len(lengths), int(lengths.sum(dtype=np.int64)), float(targets.sum()))


@dataclass(frozen=True)
class Fitted:
    """The rows that can be trained, in store order, with their columns; `kept`: what they amount to.

    `dropped`: the rows that are left out; `truncated`: how many rows were cut, and what was cut off.
    """

    rows: Rows
    lengths: Column
    targets: Column
    kept: Amount
    dropped: Amount
    truncated: Amount

    def longest(self, count: int) -> Ints:
        """The places of the `count` longest rows (all of them where there are fewer), the longest first."""
        best, lengths = np.empty(0, np.int64), np.empty(0, np.int32)
        for block in _blocks(len(self.rows)):
            best = np.concatenate([best, np.arange(block.start, block.stop)])
            lengths = np.concatenate([lengths, self.lengths[block]])
            most = min(count, len(best))
            first = np.argpartition(-lengths, most - 1)[:most]
            best, lengths = best[first], lengths[first]
        return best[np.argsort(-lengths, kind="stable")]


@dataclass(frozen=True)
class _Part:
    """What came of one block."""

    rows: Rows
    cut: Rows
    cut_targets: Floats
    kept: Amount
    dropped: Amount
    truncated: Amount
    over: Amount
    longest: int


def fit(
    lengths: NDArray[np.int32],
    targets: Floats,
    max_len: int,
    policy: str,
    *,
    name: str = "",
    chosen: NDArray[np.bool_] | None = None,
    kept_targets: Callable[[Rows], Floats] | None = None,
) -> Fitted:
    """Apply `data.overlong`: drop | truncate | error. Rows without any target are always dropped.

    `chosen`: the rows to consider (the train split), all by default. `truncate` keeps the first `max_len` tokens;
    `kept_targets(rows)` gives the sum of the weights over the targets among them, float64, and is asked for overlong
    rows only. Every loss is counted, also in supervised tokens. Raises DataError for policy `error` with an overlong
    row.
    """
    kind = np.int32 if len(lengths) <= np.iinfo(np.int32).max else np.int64
    cut_to = kept_targets if policy == "truncate" else None
    parts = []
    for block in _blocks(len(lengths)):
        places = np.arange(block.stop - block.start) if chosen is None else np.flatnonzero(chosen[block])
        rows = (block.start + places).astype(kind)
        parts.append(_look_at(rows, lengths[rows], np.asarray(targets[rows], np.float64), max_len, cut_to))
    over = sum((part.over for part in parts), Amount())
    if policy == "error" and over.rows:
        raise DataError(
            f"{name}: {over.rows} conversations with {over.targets:.0f} supervised tokens are longer than "
            f"data.max_len={max_len} (the longest has {max(part.longest for part in parts)} tokens); none may be with "
            "data.overlong=error: raise data.max_len, or set data.overlong=drop or truncate"
        )
    nothing = np.empty(0, kind)
    rows = np.concatenate([nothing, *(part.rows for part in parts)])
    cut = np.concatenate([nothing, *(part.cut for part in parts)])
    cut_targets = np.concatenate([np.empty(0), *(part.cut_targets for part in parts)])
    return Fitted(
        rows=rows,
        lengths=Column(lengths, rows, cut, np.full(len(cut), max_len, lengths.dtype)),
        targets=Column(targets, rows, cut, cut_targets),
        kept=sum((part.kept for part in parts), Amount()),
        dropped=sum((part.dropped for part in parts), Amount()),
        truncated=sum((part.truncated for part in parts), Amount()),
    )


def _look_at(
    rows: Rows, length: NDArray[np.int32], target: Floats, max_len: int, cut_to: Callable[[Rows], Floats] | None
) -> _Part:
    """One block: overlong rows are cut where `cut_to` gives the targets that are left of them, else dropped."""
    over = length > max_len
    after, kept = target.copy(), ~over
    if cut_to is not None and over.any():
        after[over] = cut_to(rows[over])
        kept[:] = True
    kept &= after > 0
    cut = kept & over
    return _Part(
        rows=rows[kept],
        cut=rows[cut],
        cut_targets=after[cut],
        kept=Amount.of(np.minimum(length[kept], max_len), after[kept]),
        dropped=Amount.of(length[~kept], target[~kept]),
        truncated=Amount.of(length[cut] - max_len, target[cut] - after[cut]),
        over=Amount.of(length[over], target[over]),
        longest=int(length.max(initial=0)),
    )


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))
