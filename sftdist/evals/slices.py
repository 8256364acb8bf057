"""Which prompts a model fails most: by length, by turn, by tag, and by source.

A slice counts as weak where an interval says that it scores lower than the others of its source. Many slices are looked
at and some score low by chance: the intervals are widened for as many as there are (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftdist.evals.intervals import Estimate, estimate

FEWEST = 20  # prompts of a slice, and of what it is compared with
LONGEST = 3  # turns that are told apart; more are one slice


@dataclass(frozen=True)
class Scored:
    """A prompt with the main score of both models: `words` of the whole prompt, `turn` answers before."""

    source: str
    metric: str
    tuned: float
    base: float | None
    words: int
    turn: int
    tags: tuple[str, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any], metric: str) -> Scored | None:
        """From a line of rows.jsonl; None where it has no such score."""
        found = row["scores"].get(metric, {})
        if found.get("tuned") is None:
            return None
        words = sum(len(message["content"].split()) for message in row["prompt"])
        return cls(row["source"], metric, found["tuned"], found.get("base"), words, row["turn"], tuple(row["tags"]))


@dataclass(frozen=True)
class Slice:
    """Prompts that have something in common. `others`: the score of those they are compared with; `apart`: their score
    minus that, `low` to `high` its interval, widened for all slices that were tried."""

    source: str
    by: str
    name: str
    metric: str
    prompts: int
    score: float
    base: float | None
    others: float
    apart: float
    low: float
    high: float


@dataclass(frozen=True)
class _Candidate:
    source: str
    by: str
    name: str
    inside: Sequence[Scored]
    outside: Sequence[Scored]


def weak_slices(rows: Sequence[Scored], confidence: float = 0.95) -> tuple[list[Slice], int]:
    """The slices that score lower than the others, the surest first; and how many slices were compared."""
    candidates = [one for one in _candidates(rows) if min(len(one.inside), len(one.outside)) >= FEWEST]
    found = [one for one in candidates if _compared(one, confidence).high < 0]  # a wider interval holds all of this one
    widened = [_compared(one, 1 - (1 - confidence) / len(candidates)) for one in found]
    return sorted((one for one in widened if one.high < 0), key=lambda one: one.high), len(candidates)


def apart(one: Estimate, other: Estimate) -> Estimate:
    """The difference of two independent figures from their own intervals (Newcombe 1998, Statistics in Medicine 17:873,
    method 10)."""
    value = one.value - other.value
    down = math.hypot(one.value - one.low, other.high - other.value)
    up = math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, value - down, value + up)


def _compared(candidate: _Candidate, confidence: float) -> Slice:
    inside, outside = candidate.inside, candidate.outside
    one, other = (estimate([row.tuned for row in rows], None, confidence) for rows in (inside, outside))
    base = [row.base for row in inside if row.base is not None]
    difference = apart(one, other)
    return Slice(
        candidate.source,
        candidate.by,
        candidate.name,
        inside[0].metric,
        len(inside),
        one.value,
        sum(base) / len(base) if base else None,
        other.value,
        difference.value,
        difference.low,
        difference.high,
    )


def _candidates(rows: Sequence[Scored]) -> Iterator[_Candidate]:
    for source in sorted({row.source for row in rows}):
        own = [row for row in rows if row.source == source]
        alike = [row for row in rows if row.metric == own[0].metric]
        yield _candidate(source, "source", source, alike, [row.source == source for row in alike])
        lengths = [_length(row.words, _quarters(own)) for row in own]
        turns = [_turn(row.turn) for row in own]
        for by, names in (("length", lengths), ("turn", turns)):
            for name in sorted(set(names)):
                yield _candidate(source, by, name, own, [here == name for here in names])
        for tag in sorted({tag for row in own for tag in row.tags}):
            yield _candidate(source, "tag", tag, own, [tag in row.tags for row in own])


def _candidate(source: str, by: str, name: str, rows: Sequence[Scored], inside: Sequence[bool]) -> _Candidate:
    pairs = list(zip(rows, inside, strict=True))
    return _Candidate(source, by, name, [row for row, here in pairs if here], [row for row, here in pairs if not here])


def _quarters(rows: Sequence[Scored]) -> list[int]:
    """The most words of each quarter of the prompts but the last."""
    edges = np.quantile([row.words for row in rows], [0.25, 0.5, 0.75])
    return sorted({int(edge) for edge in edges})


def _length(words: int, edges: Sequence[int]) -> str:
    below = [edge for edge in edges if edge < words]
    if len(below) == len(edges):
        return f"more than {edges[-1]:,} words"
    return f"{below[-1] + 1:,} to {edges[len(below)]:,} words" if below else f"up to {edges[0]:,} words"


def _turn(turn: int) -> str:
    if turn == 0:
        return "first answer"
    return f"{min(turn, LONGEST)}{' or more' if turn >= LONGEST else ''} answers before"
