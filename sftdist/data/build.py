"""From shards to a published store: what is decided over all rows leaves them, and is counted and listed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from sftdist.core.storage import write_json
from sftdist.data.duplicates import CONTRADICTION, STAGE, STAGES, Decision, Facts
from sftdist.data.encode import Columns, Job, Label, Samples, Shard, renumbered
from sftdist.data.held_out import HELD_OUT
from sftdist.data.lint import Lint
from sftdist.data.shards import Piece, own_file, signatures_of
from sftdist.data.store import LABELS, SPLITS, TRAIN, Block, StoreFigures, TokenStore, write_store
from sftdist.data.template import ChatTemplate

REJECTS = "rejects.jsonl"  # bad and refused rows, with their text
DROPPED = "dropped.jsonl"  # rows that left after they were parsed: which, at which stage, for which row
FINDINGS = "findings.jsonl"  # what is wrong with train rows that stay
REASONS = {
    "duplicate": "the same as an earlier row",
    "contradiction": "the same prompt with another answer",
    "near_duplicate": "nearly the same as an earlier row",
}
EXAMPLES = 3
EXAMPLE_CHARACTERS = 600
SAY_EVERY_SECONDS = 5.0
KEPT, REFUSED = STAGE["kept"], STAGE["refused"]


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
    rules: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    lint: Lint = field(default_factory=Lint)


@dataclass(frozen=True)
class Files:
    """The lists beside the columns of a store, open."""

    rejects: TextIO
    dropped: TextIO
    findings: TextIO
    held_out: TextIO


def build_store(
    path: Path,
    job: Job,
    pieces: Iterable[Piece],
    *,
    decide: Callable[[Facts], Decision],
    ingredients: dict[str, Any],
    work: Path,
    tick: Callable[[str], None],
    verify: Callable[[], None],
) -> TokenStore:
    """Write the store of a job from the shards of its whole input. `decide` says which rows stay; `work` is a folder
    for what is too large for memory; `tick` is told again and again how far it is, `verify` runs before publishing."""
    found, columns = _gathered(pieces, job, tick)
    signatures = None if job.near is None else signatures_of(found, own_file(work / "signatures"))
    decision = decide(_facts(columns, signatures))
    tally = Tally()

    def produce(folder: Path) -> Iterator[Block]:
        job.template.save(folder / "tokenizer")
        with ExitStack() as files:
            lists = [
                files.enter_context((folder / name).open("w", encoding="utf-8"))
                for name in (REJECTS, DROPPED, FINDINGS, HELD_OUT)
            ]
            yield from _blocks(folder, job, found, decision, tally, Files(*lists))
        verify()

    def describe(figures: StoreFigures) -> dict[str, Any]:
        return {
            "key": path.name.rpartition("-")[2],
            "ingredients": ingredients,
            "counts": {stage: asdict(count) for stage, count in tally.stages.items()},
            "reasons": dict(sorted(tally.reasons.items())),
            "rules": dict(sorted(tally.rules.items())),
            "found": dict(sorted((tally.found + _only_found(decision)).items())),
            "lint": tally.lint.figures(),
            "examples": _examples(found, decision, job),
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


def _facts(columns: Columns, signatures: NDArray[np.uint16] | None) -> Facts:
    return Facts(
        contents=columns.contents,
        prompts=columns.prompts,
        answers=columns.answers,
        split=columns.split,
        signatures=signatures,
        refused=columns.refused,
        flags=columns.flags,
    )


def _only_found(decision: Decision) -> Counter[str]:
    """How many rows of each finding stay."""
    left = Counter({stage: int((decision.stage == STAGE[stage]).sum()) for stage in decision.found})
    return Counter(decision.found) - left


# --- row by row -----------------------------------------------------------------------------------------


def _blocks(
    folder: Path, job: Job, pieces: Sequence[Piece], decision: Decision, tally: Tally, files: Files
) -> Iterator[Block]:
    """The kept rows, a shard at a time; what left, and what is wrong, goes into its list."""
    labels: dict[Label, int] = {}
    twins = _names_of(pieces, np.concatenate([decision.twin, decision.contradicts]))
    start = 0
    for piece in pieces:
        shard = piece.load()
        rows = slice(start, start + shard.rows)
        start = rows.stop
        stage = decision.stage[rows]
        _count(tally, shard, stage)
        tally.rules += shard.rules
        tally.lint.add(shard.lint)
        _list_rejects(files.rejects, shard, stage, tally)
        _list_dropped(files.dropped, job, shard, stage, [twins.get(row) for row in decision.twin[rows].tolist()])
        _list_findings(files.findings, shard, stage, tally)
        against = [twins.get(row) for row in decision.contradicts[rows].tolist()]
        _list_contradictions(files.findings, job, shard, stage, against)
        _list_held_out(files.held_out, shard, stage)
        yield _block(shard, stage[shard.samples.of] == KEPT, labels)
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


def _list_rejects(file: TextIO, shard: Shard, stage: NDArray[np.uint8], tally: Tally) -> None:
    left = [problem for i, problem in shard.refused.items() if stage[i] == REFUSED]
    for problem in [*shard.bad, *left]:
        tally.reasons[f"{problem.kind}: {problem.reason}"] += 1
        _write(file, problem.to_dict(problem.file))


def _list_dropped(file: TextIO, job: Job, shard: Shard, stage: NDArray[np.uint8], twins: Sequence[str | None]) -> None:
    for i in np.flatnonzero(stage != KEPT).tolist():
        row = {
            "id": shard.row_ids[i],
            "file": job.parts[shard.files[i]].name,
            "line": int(shard.lines[i]),
            "stage": STAGES[stage[i]],
            "reason": _reason(shard, i, STAGES[stage[i]]),
            "twin": twins[i],
        }
        _write(file, row)


def _reason(shard: Shard, row: int, stage: str) -> str:
    """Why a row left: what is said of all rows of its stage, or of this one."""
    if stage in REASONS:
        return REASONS[stage]
    problems = [shard.refused[row]] if row in shard.refused else shard.findings[row]
    return next(problem.message for problem in problems if problem.kind == stage)


def _list_findings(file: TextIO, shard: Shard, stage: NDArray[np.uint8], tally: Tally) -> None:
    for i, problems in shard.findings.items():
        if stage[i] == KEPT and shard.columns.split[i] == TRAIN:
            tally.found.update({problem.kind for problem in problems})
            for problem in problems:
                _write(file, problem.to_dict(problem.file))


def _list_contradictions(
    file: TextIO, job: Job, shard: Shard, stage: NDArray[np.uint8], against: Sequence[str | None]
) -> None:
    for i, twin in enumerate(against):
        if twin is not None and stage[i] == KEPT and shard.columns.split[i] == TRAIN:
            place = {"file": job.parts[shard.files[i]].name, "line": int(shard.lines[i]), "id": shard.row_ids[i]}
            said = {"reason": "one prompt with different answers", "message": f"another answer to the prompt of {twin}"}
            _write(file, {"kind": CONTRADICTION, "source": job.source.name, **place, **said})


def _list_held_out(file: TextIO, shard: Shard, stage: NDArray[np.uint8]) -> None:
    """The conversations that are not trained on, as an evaluation asks them."""
    for i, row in shard.held_out.items():
        if stage[i] == KEPT:
            keys = {
                "prompt": shard.columns.prompts[i].tobytes().hex(),
                "content": shard.columns.contents[i].tobytes().hex(),
            }
            _write(file, {"split": SPLITS[shard.columns.split[i]], **keys, **row})


def _write(file: TextIO, row: dict[str, Any]) -> None:
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


# --- to look at -----------------------------------------------------------------------------------------


def _examples(pieces: Sequence[Piece], decision: Decision, job: Job) -> dict[str, list[dict[str, Any]]]:
    """A few pairs of rows of each finding with where they stand and, where they were tokenised, their text."""
    pairs = {stage: several[:EXAMPLES] for stage, several in decision.examples.items()}
    shown = _shown(pieces, {row for several in pairs.values() for pair in several for row in pair}, job)
    return {
        stage: [
            {**shown[row], **{f"twin_{k}" if k != "id" else "twin": v for k, v in shown[twin].items()}}
            for row, twin in several
        ]
        for stage, several in pairs.items()
    }


def _shown(pieces: Sequence[Piece], rows: set[int], job: Job) -> dict[int, dict[str, Any]]:
    shown = {}
    start = 0
    for piece in pieces:
        here = sorted(row - start for row in rows if start <= row < start + piece.rows)
        if here:
            shard = piece.load()
            for i in here:
                place = {"id": shard.row_ids[i], "file": job.parts[shard.files[i]].name, "line": int(shard.lines[i])}
                shown[start + i] = {**place, "text": _text(shard.samples, i, job.template)}
        start += piece.rows
    return shown


def _text(samples: Samples, row: int, template: ChatTemplate) -> str:
    first = np.flatnonzero(samples.of == row)[:1]
    if not len(first):
        return ""
    start = int(samples.lengths[: first[0]].sum())
    ids = samples.ids[start : start + int(samples.lengths[first[0]])]
    return template.tokenizer.decode(ids.tolist(), skip_special_tokens=False)[:EXAMPLE_CHARACTERS]


# --- how far --------------------------------------------------------------------------------------------


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
