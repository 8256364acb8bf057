"""From shards to a published store: what is decided over all rows leaves them, and is counted and listed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from sftdist.core.storage import write_json
from sftdist.data.encode import Columns, Job, Label, Samples, Shard, renumbered
from sftdist.data.shards import Piece
from sftdist.data.store import LABELS, Block, StoreFigures, TokenStore, write_store

STAGES = ("read", "left_out", "bad", "duplicate", "held_out", "refused", "kept")
REJECTS = "rejects.jsonl"  # bad and refused rows, with their text
DROPPED = "dropped.jsonl"  # rows that left after they were parsed: which, at which stage, for which row
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


@dataclass(frozen=True)
class Decision:
    """What becomes of each conversation of a source: its stage, and the row that it leaves for (-1: none), int64."""

    stage: NDArray[np.uint8]
    twin: NDArray[np.int64]


def decide(columns: Columns, *, deduplicate: bool, forbidden: frozenset[bytes]) -> Decision:
    """Over all rows of a source. `forbidden` are prompts that other files hold out."""
    rows = len(columns.split)
    stage = np.full(rows, STAGES.index("kept"), dtype=np.uint8)
    stage[columns.refused] = STAGES.index("refused")
    if forbidden:
        held_out = [prompt.tobytes() in forbidden for prompt in columns.prompts]
        stage[np.array(held_out, dtype=bool)] = STAGES.index("held_out")
    twin = np.full(rows, -1, dtype=np.int64)
    if deduplicate and rows:
        contents = np.ascontiguousarray(columns.contents).view(f"V{columns.contents.shape[1]}").ravel()
        _, first, of = np.unique(contents, return_index=True, return_inverse=True)
        later = first[of] != np.arange(rows)
        stage[later] = STAGES.index("duplicate")
        twin[later] = first[of][later]
    return Decision(stage, twin)


def build_store(
    path: Path,
    job: Job,
    pieces: Iterable[Piece],
    *,
    deduplicate: bool,
    forbidden: frozenset[bytes],
    ingredients: dict[str, Any],
    tick: Callable[[str], None],
    verify: Callable[[], None],
) -> TokenStore:
    """Write the store of a job from the shards of its whole input. `forbidden` are prompts that other files hold out;
    `tick` is told again and again how far it is, `verify` runs before publishing."""
    found, columns = _gathered(pieces, job, tick)
    decision = decide(columns, deduplicate=deduplicate, forbidden=forbidden)
    tally = Tally()

    def produce(folder: Path) -> Iterator[Block]:
        job.template.save(folder / "tokenizer")
        yield from _blocks(folder, job, found, decision, tally)
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


def _gathered(pieces: Iterable[Piece], job: Job, tick: Callable[[str], None]) -> tuple[list[Piece], Columns]:
    """All pieces, once they are there, and what deciding needs of them."""
    found: list[Piece] = []
    columns: list[Columns] = []
    progress = Progress(job)
    for piece in pieces:
        found.append(piece)
        columns.append(piece.columns)
        tick(progress.after(piece.read, piece.size))
    return found, Columns.joined(columns)


def _blocks(folder: Path, job: Job, pieces: Sequence[Piece], decision: Decision, tally: Tally) -> Iterator[Block]:
    """The kept rows, a shard at a time; files of what left are written beside the columns."""
    labels: dict[Label, int] = {}
    twins = _names_of(pieces, decision.twin)
    start = 0
    with (folder / REJECTS).open("w", encoding="utf-8") as rejects, (folder / DROPPED).open("w") as dropped:
        for piece in pieces:
            shard = piece.load()
            rows = slice(start, start + len(shard.row_ids))
            start = rows.stop
            stage = decision.stage[rows]
            _count(tally, shard, stage)
            _write_rejects(rejects, shard, stage, tally)
            _write_dropped(dropped, job, shard, stage, [twins.get(row) for row in decision.twin[rows].tolist()])
            yield _block(shard, stage[shard.samples.of] == STAGES.index("kept"), labels)
    write_json(folder / LABELS, [{"tags": tags, "label_origin": origin} for tags, origin in labels])


def _names_of(pieces: Sequence[Piece], rows: NDArray[np.int64]) -> dict[int, str]:
    """The ids of the conversations with these numbers; -1 is none."""
    wanted = np.unique(rows[rows >= 0])
    names: dict[int, str] = {}
    start = 0
    for piece in pieces:
        here = wanted[slice(*np.searchsorted(wanted, [start, start + piece.rows]))]
        if len(here):
            ids = piece.row_ids
            names.update((row, ids[row - start]) for row in here.tolist())
        start += piece.rows
    return names


def _write_rejects(file: TextIO, shard: Shard, stage: NDArray[np.uint8], tally: Tally) -> None:
    left = [problem for i, problem in shard.refused.items() if stage[i] == STAGES.index("refused")]
    for problem in [*shard.bad, *left]:
        tally.reasons[f"{problem.kind}: {problem.reason}"] += 1
        file.write(json.dumps(problem.to_dict(problem.file), ensure_ascii=False) + "\n")


def _write_dropped(file: TextIO, job: Job, shard: Shard, stage: NDArray[np.uint8], twins: Sequence[str | None]) -> None:
    for i in np.flatnonzero(stage != STAGES.index("kept")).tolist():
        name = STAGES[stage[i]]
        row = {
            "id": shard.row_ids[i],
            "file": job.parts[shard.files[i]].name,
            "line": int(shard.lines[i]),
            "stage": name,
            "reason": shard.refused[i].reason if name == "refused" else None,
            "twin": twins[i],
        }
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _count(tally: Tally, shard: Shard, stage_of: NDArray[np.uint8]) -> None:
    tally.stages["read"].rows += shard.read
    tally.stages["left_out"].rows += shard.left_out
    tally.stages["bad"].rows += len(shard.bad)
    samples = shard.samples
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


def _block(shard: Shard, keep: NDArray[np.bool_], labels: dict[Label, int]) -> Block:
    """The kept samples of a shard; their arrays are copied only where something leaves."""
    samples = shard.samples
    of = samples.of[keep]
    everything = bool(keep.all())
    tokens = slice(None) if everything else np.repeat(keep, samples.lengths)
    return Block(
        ids=samples.ids[tokens],
        weights=samples.weights[tokens],
        lengths=samples.lengths[keep],
        split=shard.columns.split[of],
        files=shard.files[of],
        lines=shard.lines[of],
        row_ids=samples.names if everything else [name for name, kept in zip(samples.names, keep, strict=True) if kept],
        contents=shard.columns.contents[of],
        prompts=shard.columns.prompts[of],
        labels=renumbered(shard.labels[of], shard.label_names, labels),
        signatures=None if shard.signatures is None else shard.signatures[of],
    )


class Progress:
    """How far the shards of a job are."""

    def __init__(self, job: Job) -> None:
        self._name = job.source.name
        files = [part.file for part in job.parts if part.file is not None]
        self._total = sum(file.stat().st_size for file in files)
        self._start, self._rows, self._size = time.monotonic(), 0, 0

    def after(self, rows: int, size: int) -> str:
        """What to say after so many rows more, and bytes of the files; 0 bytes where the rows are in no file."""
        self._rows, self._size = self._rows + rows, self._size + size
        share = self._size / self._total if self._size else None
        return how_far(self._name, self._rows, time.monotonic() - self._start, share)


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
