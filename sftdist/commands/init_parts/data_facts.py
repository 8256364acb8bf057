"""What a data file holds, seen through the model's tokenizer and template: lengths, refused rows, kinds of answers.

Of a large file a sample is looked at: chunks of rows that are spread evenly over it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sftdist.commands.init_parts.answer_kind import Answers, look_at_answers
from sftdist.core.errors import DataError
from sftdist.core.rules import BROUGHT_ALONG
from sftdist.core.settings import TrainOn
from sftdist.data.answers import trained_answers
from sftdist.data.encode import Job, encode_chunk
from sftdist.data.mask import MaskOptions
from sftdist.data.problems import Problem
from sftdist.data.sources import Chunk, Part, Place, Source, parse_chunk, parts_of, places, read_chunk
from sftdist.data.template import ChatTemplate

CHUNKS = 16  # of 512 rows
SHOWN = 3  # problems
OWN_NAMES = ("validation", "holdout", *BROUGHT_ALONG)  # that a source cannot have


@dataclass(frozen=True)
class DataFacts:
    """`rows`: in the file; `looked`: of which so many were looked at, and `problems` cannot be trained on. Of the token
    rows of the others: `lengths` int [n] and `targets` float [n] in tokens. `longest_answer`: tokens of a long answer
    (99.5 of 100 are shorter); `expand_turns`: each turn has to be a sample of its own."""

    path: str
    name: str
    rows: int
    looked: int
    problems: tuple[str, ...]
    lengths: NDArray[np.int64]
    targets: NDArray[np.float64]
    longest_answer: int
    expand_turns: bool
    answers: Answers

    @property
    def usable(self) -> int:
        """Rows of the file that can be trained on, estimated from those that were looked at."""
        return round(self.rows * (1 - len(self.problems) / self.looked))

    @property
    def tokens(self) -> float:
        """Tokens of the whole file, estimated."""
        return float(self.lengths.sum()) * self.rows / self.looked

    @property
    def mean(self) -> float:
        return float(self.lengths.mean())

    @property
    def seen(self) -> str:
        """Which rows the figures are of."""
        if self.looked == self.rows:
            return f"all {self.rows:,} rows"
        return f"{self.looked:,} of {self.rows:,} rows, spread evenly"


def look_at_data(path: str, template: ChatTemplate) -> DataFacts:
    """Raises DataError where there are no rows, or none that can be trained on with this template."""
    source = Source(source_name(path), path, key="--data")
    parts = parts_of(source)
    found, rows = _spread(places(parts))
    chunks = [read_chunk(place, parts) for place in found]
    if not rows:
        raise DataError(f"--data: given {path} without a row, required conversations, one a line")
    seen = _encode(source, parts, chunks, template, MaskOptions())
    expand = False
    if seen.refused:  # a template that rewrites history can be trained turn by turn
        single = _encode(source, parts, chunks, template, MaskOptions(expand_turns=True))
        expand = len(single.refused) < len(seen.refused)
        seen = single if expand else seen
    problems = (*seen.bad, *seen.refused)
    if not seen.lengths.size:
        raise DataError(
            "\n".join(
                [
                    f"--data: given {path}, of which no row can be trained on with this model; the first reasons:",
                    *problems[:SHOWN],
                ]
            )
        )
    answers = [
        answer.text
        for chunk in chunks
        for conversation, _ in parse_chunk(chunk, source, parts[chunk.part]).conversations
        for answer in trained_answers(conversation, TrainOn.all)
    ]
    long = float(np.percentile(seen.targets, 99.5, method="higher"))
    return DataFacts(
        path=path,
        name=source.name,
        rows=rows,
        looked=sum(len(chunk.rows) for chunk in chunks),
        problems=problems,
        lengths=seen.lengths,
        targets=seen.targets,
        longest_answer=max(1, round(long * min(1.0, len(seen.targets) / max(1, len(answers))))),
        expand_turns=expand,
        answers=look_at_answers(answers),
    )


def source_name(path: str) -> str:
    """A name for the source, from the file's: the metrics of its rows begin with it."""
    stem = Path(path.removeprefix("hub:")).name.partition(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")
    if not name:
        return "train"
    return f"{name}_rows" if name in OWN_NAMES else name


@dataclass(frozen=True)
class _Encoded:
    lengths: NDArray[np.int64]
    targets: NDArray[np.float64]
    bad: tuple[str, ...]
    refused: tuple[str, ...]


def _encode(
    source: Source, parts: Sequence[Part], chunks: Sequence[Chunk], template: ChatTemplate, mask: MaskOptions
) -> _Encoded:
    job = Job(source, tuple(parts), template, mask)
    shards = [encode_chunk(job, chunk) for chunk in chunks]
    lengths = [shard.samples.lengths.astype(np.int64) for shard in shards]
    targets = [_sums(shard.samples.weights > 0, shard.samples.lengths) for shard in shards]
    return _Encoded(
        np.concatenate([np.empty(0, np.int64), *lengths]),
        np.concatenate([np.empty(0, np.float64), *targets]),
        tuple(_said(problem) for shard in shards for problem in shard.bad),
        tuple(_said(problem) for shard in shards for problem in shard.refused.values()),
    )


def _said(problem: Problem) -> str:
    return f"{problem.file}:{problem.line}: {problem.message}"


def _sums(flags: NDArray[np.bool_], lengths: NDArray[np.int32]) -> NDArray[np.float64]:
    """How many are true of each row; rows lie end to end."""
    total = np.concatenate([[0.0], np.cumsum(flags, dtype=np.float64)])
    ends = np.cumsum(lengths)
    found: NDArray[np.float64] = total[ends] - total[ends - lengths]
    return found


def _spread(all_places: Iterable[Place]) -> tuple[list[Place], int]:
    """At most 2 * CHUNKS places, evenly spread, and the number of rows of all. A table is in its places, so that only
    those are kept that count."""
    kept: list[Place] = []
    stride, rows = 1, 0
    for number, place in enumerate(all_places):
        rows += place.count
        if number % stride == 0:
            kept.append(place)
        if len(kept) > 2 * CHUNKS:
            kept, stride = kept[::2], stride * 2
    return kept, rows
