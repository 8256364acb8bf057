"""The order in which conversations are drawn: a pure function of (seed, position).

Sources are merged by virtual time (stride scheduling): a conversation of source s stands at
(supervised tokens of s up to its middle) / lambda_s, and the earliest is drawn first. That is
"largest deficit first", but for a whole window at a time, with one sort and no loop over rows.

Each source is walked as a seeded permutation without replacement, pass after pass; see
`data/permutation.py` for why a source of 10^8 rows costs no more than one of ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import ConfigError, DataError
from sftdist.data.fitting import Column, Floats, Rows
from sftdist.data.permutation import Ints, key64, permute

CHUNK = 1 << 15  # draws of one source looked up at a time
CUT_SHARE = 16  # a window ends where the shares are exact, within its last sixteenth


@dataclass(frozen=True)
class SourceTable:
    """What the plan knows of one source: columns over its trainable rows (memory maps, or looked up in some).

    `lengths` int32 [N] tokens; `targets` float64 [N] sum of the weights over targets; `rows`
    [N] row numbers in the store; `lam` the source's lambda (any scale, 0: not drawn);
    `max_passes` how often the source may be seen; `key` names the content (the store's key with
    what was dropped): with it the arrays are not hashed for the plan's fingerprint;
    `total_targets` is sum(targets) where the manifest knows it.
    """

    name: str
    lengths: NDArray[np.int32] | Column
    targets: Floats | Column
    rows: Rows
    lam: float
    max_passes: float | None = None
    key: str = ""
    total_targets: float | None = None

    @cached_property
    def total(self) -> float:
        """Supervised tokens of one pass."""
        return float(np.sum(self.targets[:])) if self.total_targets is None else self.total_targets


def resolve_lambdas(
    totals: Sequence[float], given: Sequence[float | None], temperature: float | None = None
) -> list[float]:
    """One lambda per source, summing to 1.

    `totals`: supervised tokens per source. Sources without a lambda share what the given ones
    leave, in proportion to total^(1/temperature) (1: natural, large: equal). Given lambdas are
    normalised when every source has one. Raises ConfigError.
    """
    issues = [f"lambda {lam} is negative; 0 or more is required" for lam in given if lam is not None and lam < 0]
    if temperature is not None and temperature <= 0:
        issues.append(f"data.temperature={temperature}: a number above 0 is required")
    known = sum(lam for lam in given if lam is not None)
    open_sources = [i for i, lam in enumerate(given) if lam is None]
    if open_sources and known >= 1 and len(open_sources) < len(given):
        issues.append(
            f"the given lambdas sum to {known:g} and {len(open_sources)} sources have none: "
            "give every source a lambda, or let the given ones sum to less than 1"
        )
    if not open_sources and known == 0:
        issues.append("all lambdas are 0: at least one source needs a lambda above 0")
    if issues:
        raise ConfigError(issues)
    if not open_sources:
        return [float(lam or 0.0) / known for lam in given]
    heat = [totals[i] ** (1 / (temperature or 1.0)) if totals[i] > 0 else 0.0 for i in open_sources]
    if sum(heat) == 0:
        raise DataError("no source without a lambda has a supervised token: check data.train_on and the data report")
    lambdas = [lam or 0.0 for lam in given]
    for i, part in zip(open_sources, heat, strict=True):
        lambdas[i] = (1 - known) * part / sum(heat)
    return lambdas


@dataclass(frozen=True)
class Cursor:
    """How much of each source was drawn: conversations, and the sum of their weights over targets."""

    drawn: tuple[int, ...]
    mass: tuple[float, ...]

    @classmethod
    def start(cls, sources: int) -> Cursor:
        return cls((0,) * sources, (0.0,) * sources)


@dataclass(frozen=True)
class Drawn:
    """Conversations in mixture order: `source` int16 [n], `index` int64 [n] into the source's table."""

    source: NDArray[np.int16]
    index: Ints
    mass: Floats
    end: str = ""  # why the draws end with this window: "epochs", a source that ran out of passes, or ""


@dataclass
class Mixture:
    """Draws windows of conversations so that the mass of each source stays in proportion to `lambdas`.

    `sizes`: rows per source; `masses[s](index)` gives the float64 mass of rows of source s (their
    weight over targets); `limits[s]`: draws allowed; `horizon`: total mass after which the draws end.
    """

    sizes: Sequence[int]
    lambdas: Sequence[float]
    masses: Sequence[Callable[[Ints], Floats]]
    seed: int
    limits: Sequence[int | None]
    horizon: float | None = None
    names: Sequence[str] = ()
    _fetch: dict[int, int] = field(default_factory=dict)  # speed only: what the last window took of each source

    def __post_init__(self) -> None:
        self.active = [s for s, lam in enumerate(self.lambdas) if lam > 0]
        self._chunk = lru_cache(maxsize=2 * len(self.sizes))(self._look_up)

    def _look_up(self, source: int, chunk: int) -> tuple[Ints, Floats]:
        draws = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK, dtype=np.int64)
        index = permute(draws, self.sizes[source], key64(self.seed, source))
        return index, self.masses[source](index)

    def _walk(self, source: int, start: int, stop: int) -> tuple[Ints, Floats]:
        """Index and mass of the draws [start, stop) of one source."""
        parts = [self._chunk(source, c) for c in range(start // CHUNK, -(-stop // CHUNK))]
        first = start - start // CHUNK * CHUNK
        index = np.concatenate([p[0] for p in parts]) if parts else np.empty(0, np.int64)
        mass = np.concatenate([p[1] for p in parts]) if parts else np.empty(0)
        return index[first : first + stop - start], mass[first : first + stop - start]

    def draw(self, cursor: Cursor, count: int) -> tuple[Drawn, Cursor]:
        """The next window: at most `count` conversations, fewer where that makes the shares more exact."""
        per_source = -(-count // len(self.active)) + 64
        fetch = {s: self._fetch.get(s, per_source) for s in self.active}
        while True:
            source, index, mass, middle, limit, end = self._candidates(cursor, fetch)
            order = np.argsort(middle, kind="stable")
            ready = int(np.searchsorted(middle[order], limit))
            if ready >= count or end:
                break
            fetch = {s: 2 * n for s, n in fetch.items()}
        order = order[:ready]
        if ready > count or (ready == count and not end):
            order, end = order[: self._cut(cursor, source[order[:count]], mass[order[:count]])], ""
        drawn = Drawn(source[order], index[order], mass[order], end)
        after = self._advance(cursor, drawn)
        self._fetch = {s: (after.drawn[s] - cursor.drawn[s]) * 9 // 8 + 64 for s in self.active}
        return drawn, after

    def _candidates(
        self, cursor: Cursor, fetch: dict[int, int]
    ) -> tuple[NDArray[np.int16], Ints, Floats, Floats, float, str]:
        """The next rows of every source with the virtual time of their middle.

        The order is known up to the earliest end of a source's candidates (`limit`); `end` says
        that no longer fetch can go beyond it.
        """
        limit, end = (np.inf, "") if self.horizon is None else (self.horizon, "epochs")
        parts: list[tuple[NDArray[np.int16], Ints, Floats, Floats]] = []
        for s, number in fetch.items():
            start, allowed = cursor.drawn[s], self.limits[s]
            stop = start + number if allowed is None else min(start + number, allowed)
            index, mass = self._walk(s, start, max(start, stop))
            if not (mass > 0).all():
                raise DataError(
                    f"{self.names[s]}: a conversation without a supervised token; only rows from fit() count"
                )
            total = cursor.mass[s] + np.add.accumulate(mass)
            last = (total[-1] if len(total) else cursor.mass[s]) / self.lambdas[s]
            if last < limit:
                limit, end = last, self.names[s] if stop == allowed else ""
            parts.append((np.full(len(index), s, np.int16), index, mass, (total - mass / 2) / self.lambdas[s]))
        source, index, mass, middle = (np.concatenate(column) for column in zip(*parts, strict=True))
        return source, index, mass, middle, limit, end

    def _cut(self, cursor: Cursor, source: NDArray[np.int16], mass: Floats) -> int:
        """How many of these draws make the window: among its last ends the one with the truest shares."""
        count = len(source)
        tail = max(1, count - count // CUT_SHARE)
        each = np.zeros((len(self.sizes), count - tail + 1))
        before = np.bincount(source[:tail], mass[:tail], len(self.sizes))
        each[:, 0] = np.asarray(cursor.mass) + before
        each[source[tail:], np.arange(1, count - tail + 1)] = mass[tail:]
        each = np.add.accumulate(each, axis=1)
        total = np.add.accumulate(each, axis=0)[-1]
        worst = np.abs(each - np.asarray(self.lambdas)[:, None] * total).max(0)
        return tail + int(np.argmin(worst))

    def _advance(self, cursor: Cursor, drawn: Drawn) -> Cursor:
        counts = np.bincount(drawn.source, minlength=len(self.sizes))
        masses = np.bincount(drawn.source, drawn.mass, len(self.sizes))
        return Cursor(
            tuple(a + int(b) for a, b in zip(cursor.drawn, counts, strict=True)),
            tuple(a + float(b) for a, b in zip(cursor.mass, masses, strict=True)),
        )
