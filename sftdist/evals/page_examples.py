"""Which prompts a person should read: where the tuned model is worse than its base, and where two answers differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from sftdist.evals.report import Scores

OF_EACH_SOURCE = 2  # examples, whatever other sources have
MOST_WORDS = 400  # of an answer that is compared word by word: the time grows with the square
ALIKE = 0.25  # of the words; answers that have less in common are not marked, all of it would be
_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each sign is a word
_PIECE = re.compile(rf"[{_ASIAN}]|[^\W{_ASIAN}]+|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Fall:
    """One metric of one prompt; `size` is how much worse the tuned model is, in shares of what the metric spans."""

    metric: str
    base: float | None
    tuned: float
    size: float


@dataclass(frozen=True)
class Example:
    """A row of rows.jsonl and in what it is worse, the largest fall first."""

    row: Mapping[str, Any]
    falls: tuple[Fall, ...]

    @property
    def rank(self) -> tuple[float, float, str]:
        """The worst comes first when sorted."""
        return -self.falls[0].size, -sum(fall.size for fall in self.falls), str(self.row["id"])


def regressions(rows: Iterable[Mapping[str, Any]], metrics: Mapping[str, Scores]) -> list[Example]:
    """Every prompt of which a metric fell, the worst first.

    Prompts in other words (`variant_of`) are left out: they are about how far scores move.
    """
    spans = {name: span for name, scores in metrics.items() if (span := _span(scores))}
    found = [Example(row, falls) for row in rows if not row["variant_of"] and (falls := _falls(row, metrics, spans))]
    return sorted(found, key=lambda one: one.rank)


def chosen(examples: Sequence[Example], most: int) -> list[Example]:
    """At most so many, the worst first; of each source that has one its two worst, so that none hides another."""
    places: dict[str, int] = {}
    keyed = []
    for one in examples:
        place = places[one.row["source"]] = places.get(one.row["source"], -1) + 1
        keyed.append((place >= OF_EACH_SOURCE, one.rank, one))
    return sorted((one for *_, one in sorted(keyed, key=lambda key: key[:2])[:most]), key=lambda one: one.rank)


def worst_answers(rows: Iterable[Mapping[str, Any]], name: str, scores: Scores) -> list[Example]:
    """The prompts whose tuned answer has less than the best value of one metric, the worst first.

    None for a metric without a best value. `Fall.size` is the distance to that value.
    """
    best = {True: scores.high, False: scores.low, None: None}[scores.higher_is_better]
    if best is None:
        return []
    source, _, short = name.partition(".")
    found = []
    for row in rows:
        score = row["scores"].get(short)
        if row["source"] == source and not row["variant_of"] and score and score["tuned"] not in (None, best):
            found.append(Example(row, (Fall(short, score["base"], score["tuned"], abs(best - score["tuned"])),)))
    return sorted(found, key=lambda one: one.rank)


def _falls(row: Mapping[str, Any], metrics: Mapping[str, Scores], spans: Mapping[str, float]) -> tuple[Fall, ...]:
    falls = []
    for short, score in row["scores"].items():
        name = f"{row['source']}.{short}"
        if name in spans and score["base"] is not None and score["tuned"] is not None:
            moved = score["base"] - score["tuned"]
            size = (moved if metrics[name].higher_is_better else -moved) / spans[name]
            falls += [Fall(short, score["base"], score["tuned"], size)] if size > 0 else []
    return tuple(sorted(falls, key=lambda fall: -fall.size))


def _span(scores: Scores) -> float:
    """What a metric spans: its bounds, or the values that it had; 0 where it cannot be better or worse."""
    if scores.higher_is_better is None or scores.base is None:
        return 0.0
    if scores.low is not None and scores.high is not None:
        return scores.high - scores.low
    return max(*scores.tuned, *scores.base) - min(*scores.tuned, *scores.base)


Piece = tuple[str, bool]  # a text, and whether the other answer does not have it


def compared(base: str, tuned: str) -> tuple[list[Piece], list[Piece]]:
    """Both answers in pieces, so that what only one of them says can be marked."""
    left, right = _PIECE.findall(base), _PIECE.findall(tuned)
    matcher = SequenceMatcher(str.isspace, left[:MOST_WORDS], right[:MOST_WORDS], autojunk=False)
    if base == tuned or _words_in_common(left, matcher) < ALIKE * max(_words(left), _words(right)):
        return [(base, False)], [(tuned, False)]
    codes = matcher.get_opcodes()
    ones = list(_pieces(left, [(kind in ("delete", "replace"), i, j) for kind, i, j, _, _ in codes]))
    others = list(_pieces(right, [(kind in ("insert", "replace"), i, j) for kind, _, _, i, j in codes]))
    return ones, others


def _words(pieces: Sequence[str]) -> int:
    """Of those that are compared, without the spaces between them."""
    return sum(not piece.isspace() for piece in pieces[:MOST_WORDS])


def _words_in_common(left: Sequence[str], matcher: SequenceMatcher[str]) -> int:
    return sum(_words(left[block.a : block.a + block.size]) for block in matcher.get_matching_blocks())


def _pieces(words: Sequence[str], parts: Iterable[tuple[bool, int, int]]) -> Iterator[Piece]:
    for changed, start, stop in parts:
        if text := "".join(words[start:stop]):
            yield text, changed
    if len(words) > MOST_WORDS:
        yield "".join(words[MOST_WORDS:]), False
