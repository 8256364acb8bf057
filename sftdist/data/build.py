"""From encoded chunks to a published store: duplicates, held-out prompts and refusals leave, and are counted."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from sftdist.data.encode import EncodedChunk, Job, Samples
from sftdist.data.store import Block, StoreFigures, TokenStore, write_store

STAGES = ("read", "left_out", "bad", "duplicate", "held_out", "refused", "kept")
SAY_EVERY_SECONDS = 5.0


@dataclass(slots=True)
class Count:
    """Rows, tokens and supervised weight; rows that were never tokenised have none of the last two."""

    rows: int = 0
    tokens: int = 0
    targets: float = 0.0


@dataclass
class Tally:
    """How many rows passed or left at each stage; `rows` of kept ones are samples, the others conversations."""

    stages: dict[str, Count] = field(default_factory=lambda: {stage: Count() for stage in STAGES})
    reasons: Counter[str] = field(default_factory=Counter)


def build_store(
    path: Path,
    job: Job,
    encoded: Iterable[EncodedChunk],
    *,
    deduplicate: bool,
    forbidden: frozenset[bytes],
    ingredients: dict[str, Any],
    tick: Callable[[str], None],
    verify: Callable[[], None],
) -> TokenStore:
    """Write the store of a job. `forbidden` are prompts that other files hold out; `tick` is told
    again and again how far it is, `verify` runs before publishing."""
    tally = Tally()

    def produce(folder: Path) -> Iterator[Block]:
        job.template.save(folder / "tokenizer")
        with (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
            yield from _blocks(job, _with_progress(encoded, job, tally, tick), deduplicate, forbidden, tally, rejects)
        verify()

    def describe(figures: StoreFigures) -> dict[str, Any]:
        return {
            "key": path.name.rpartition("-")[2],
            "ingredients": ingredients,
            "counts": {stage: asdict(count) for stage, count in tally.stages.items()},
            "reasons": dict(sorted(tally.reasons.items())),
            "files": [part.name for part in job.parts],
            "vocabulary": len(job.template.tokenizer),
            "bos_token_id": job.template.bos_token_id,
            "stop_ids": list(job.template.stop_ids),
            "stop_share": figures.stop_share(job.template.stop_ids),
        }

    vocabulary = 1 + max(job.template.tokenizer.get_vocab().values())
    return write_store(path, produce, name=job.source.name, vocabulary=vocabulary, describe=describe)


def _blocks(
    job: Job,
    encoded: Iterable[EncodedChunk],
    deduplicate: bool,
    forbidden: frozenset[bytes],
    tally: Tally,
    rejects: TextIO,
) -> Iterator[Block]:
    seen: set[bytes] = set()
    for chunk in encoded:
        stage_of = np.full(len(chunk.contents), STAGES.index("kept"))
        for i, content in enumerate(chunk.contents):
            if deduplicate and content in seen:
                stage_of[i] = STAGES.index("duplicate")
            elif chunk.prompts[i] in forbidden:
                stage_of[i] = STAGES.index("held_out")
            elif i in chunk.refused:
                stage_of[i] = STAGES.index("refused")
            if deduplicate:
                seen.add(content)
        left = [problem for i, problem in chunk.refused.items() if stage_of[i] == STAGES.index("refused")]
        for problem in [*chunk.bad, *left]:
            tally.reasons[f"{problem.kind}: {problem.reason}"] += 1
            rejects.write(json.dumps(problem.to_dict(problem.file), ensure_ascii=False) + "\n")
        _count(tally, chunk, stage_of)
        yield _block(chunk, stage_of[chunk.samples.of] == STAGES.index("kept"))


def _count(tally: Tally, chunk: EncodedChunk, stage_of: NDArray[np.int64]) -> None:
    tally.stages["read"].rows += chunk.read
    tally.stages["left_out"].rows += chunk.left_out
    tally.stages["bad"].rows += len(chunk.bad)
    samples = chunk.samples
    targets = _sums(samples)
    stage_of_sample = stage_of[samples.of]
    for number, stage in enumerate(STAGES):
        here = stage_of_sample == number
        count = tally.stages[stage]
        count.rows += int((stage_of == number).sum())
        count.tokens += int(samples.lengths[here].sum())
        count.targets += float(targets[here].sum())


def _sums(samples: Samples) -> NDArray[np.float64]:
    if not len(samples.lengths):
        return np.empty(0)
    starts = np.cumsum(samples.lengths, dtype=np.int64) - samples.lengths
    return np.add.reduceat(samples.weights.astype(np.float64), starts)


def _block(chunk: EncodedChunk, keep: NDArray[np.bool_]) -> Block:
    """The kept samples of a chunk; their arrays are copied only where something leaves."""
    samples = chunk.samples
    of = samples.of[keep]
    everything = bool(keep.all())
    tokens = slice(None) if everything else np.repeat(keep, samples.lengths)
    return Block(
        ids=samples.ids[tokens],
        weights=samples.weights[tokens],
        lengths=samples.lengths[keep],
        split=chunk.split[of],
        files=np.full(len(of), chunk.part, dtype=np.int64),
        lines=chunk.lines[of],
        row_ids=samples.names if everything else [name for name, kept in zip(samples.names, keep, strict=True) if kept],
    )


def _with_progress(
    encoded: Iterable[EncodedChunk], job: Job, tally: Tally, tick: Callable[[str], None]
) -> Iterator[EncodedChunk]:
    start, done = time.monotonic(), 0
    files = [part.file for part in job.parts if part.file is not None]
    total = sum(file.stat().st_size for file in files)
    for chunk in encoded:
        yield chunk
        done += chunk.size
        share = done / total if done else None
        tick(how_far(job.source.name, tally.stages["read"].rows, time.monotonic() - start, share))


def how_far(name: str, rows: int, seconds: float, share: float | None) -> str:
    """`share` of the work is done, where that is known."""
    said = f"{name}: {rows:,} rows, {rows / max(seconds, 1e-3):,.0f} rows/s"
    if share is None:
        return said
    share = min(share, 1.0)  # a file may grow while it is read
    return f"{said}, {share:.0%}, left {timedelta(seconds=round(seconds * (1 / share - 1)))}"


def at_most_every(
    seconds: float, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[str], None]:
    """`tell`, but for what comes within `seconds` of the call before; what is done sooner is not told of at all."""
    told = clock()

    def tick(text: str) -> None:
        nonlocal told
        if clock() - told >= seconds:
            told = clock()
            tell(text)

    return tick
