"""Where a run's figures go: `metrics.jsonl` is the truth, the console and W&B follow it.

A `Tracker` holds sinks; on ranks other than 0 it holds none, so that the loop never asks which rank it is on.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from sftdist.core.figures import BETTER, METRICS, REPORTS, WATCHED, number
from sftdist.core.lock import holder
from sftdist.core.storage import naming
from sftdist.training.retention import EVAL_LOSS, Standing

ROWS = "log/rows.jsonl"


class Sink(Protocol):
    """Takes lines (each with a `kind`) and is closed once, with the state the run ended in."""

    def line(self, line: Mapping[str, Any]) -> None: ...

    def close(self, state: str) -> None: ...


class JsonLines:
    """A JSON lines file that survives a kill: whole lines, flushed one by one, cut at the step a run resumes from.

    Floats are written by `repr`, so they are read back bit-equal; JSON has no word for the non-finite ones, which
    are written as the strings "nan", "inf" and "-inf".
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut(path, resumed_step)
        # Unbuffered: what a full disk did not take is not written later, nor tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._path = path

    def line(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(_plain(line), allow_nan=False) + "\n").encode("utf-8")
        with naming(self._path):
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self, state: str) -> None:
        self.sync()
        self._file.close()


@dataclass(frozen=True)
class Tracker:
    """Hands each line to the files first, then to every sink; `Tracker()` is silent, for ranks other than 0."""

    sinks: tuple[Sink, ...] = ()
    files: tuple[JsonLines, ...] = ()
    rows: tuple[JsonLines, ...] = ()

    def followed_by(self, *sinks: Sink) -> Tracker:
        """The same files with more sinks; those that read the files must be opened after them."""
        return replace(self, sinks=(*self.sinks, *sinks))

    def step(self, line: Mapping[str, Any], rows: Sequence[str]) -> None:
        """One optimizer step: its figures, and the ordered ids of the rows it trained on."""
        self.rows_of(line["step"], rows)
        self.report({"kind": "train", **line})

    def rows_of(self, step: int, rows: Sequence[str]) -> None:
        """The ordered ids of the rows of a step, written before it is tried: a step that fails can be looked at."""
        for file in self.rows:
            file.line({"step": step, "rows": list(rows)})

    def report(self, line: Mapping[str, Any]) -> None:
        """Any line; it brings its own `kind`."""
        for sink in (*self.files, *self.sinks):
            sink.line(line)

    def sync(self) -> None:
        """Make the files durable; call it before a checkpoint, so that no checkpoint is newer than its figures."""
        for file in (*self.files, *self.rows):
            file.sync()

    def close(self, state: str) -> None:
        for sink in (*self.files, *self.rows, *self.sinks):
            sink.close(state)


def open_tracker(run_dir: Path, *, resumed_step: int) -> Tracker:
    """The tracker of rank 0 with both files of the run directory, cut at `resumed_step` (0: a run from the start)."""
    return Tracker(
        files=(JsonLines(run_dir / METRICS, resumed_step=resumed_step),),
        rows=(JsonLines(run_dir / ROWS, resumed_step=resumed_step),),
    )


def cut(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run makes again. The steps rise through the file.

    A kill leaves a last line unfinished and a power cut may leave garbage; both stand behind the lines of the
    checkpoint, for the file is synced before each. So the file ends behind the last line that stays, which is looked
    for from its end: a run of a million steps is resumed as fast as a short one.
    """
    end = next((end for end, line in _from_the_end(path) if line["step"] <= step), 0)
    with naming(path), path.open("r+b") as file:
        file.truncate(end)
        os.fsync(file.fileno())


def evaluated(run_dir: Path, step: int) -> bool:
    """Whether `metrics.jsonl` holds the evaluation of this step, which is among its last ones."""
    path = run_dir / METRICS
    lines = (line for _, line in _from_the_end(path)) if path.is_file() else iter(())
    last = takewhile(lambda line: line["step"] >= step, lines)
    return any(line["kind"] == "eval" and line["step"] == step for line in last)


def evaluation_losses(run_dir: Path) -> dict[int, float]:
    """`eval/loss` by step, from the whole lines of `metrics.jsonl`; nothing where there is no such file."""
    path = run_dir / METRICS
    lines = _whole_lines(path) if path.is_file() else iter(())
    return {line["step"]: float(line["eval/loss"]) for _, line in lines if line["kind"] == "eval"}


def standing(run_dir: Path, metric: str) -> Standing:
    """How the checkpoints of a run compare by `metric`: `eval/loss`, or one that a watch has found (`core.figures`);
    one that only describes has no values."""
    if metric == EVAL_LOSS:
        return Standing(evaluation_losses(run_dir))
    path = run_dir / WATCHED
    whole = _whole_lines(path) if path.is_file() else iter(())  # a damaged line must not cost a checkpoint
    lines = [line for _, line in whole if line[BETTER].get(metric) is not None]
    found = {line["step"]: value for line in lines if (value := number(line[metric])) is not None}
    higher = any(line[BETTER][metric] for line in lines)
    return Standing(found, metric, higher, awaited=holder(run_dir / REPORTS) is not None)


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                return
            if not text.endswith("\n"):
                return
            yield text, line


def _from_the_end(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a file, the last one first, each with the place where it ends."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = data.rfind(b"\n") + 1
        while end:
            start = data.rfind(b"\n", 0, end - 1) + 1
            try:
                line = json.loads(data[start:end])
            except ValueError:  # garbage, of one encoding or another
                line = None
            if isinstance(line, dict):
                yield end, line
            end = start


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
