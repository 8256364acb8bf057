"""Where a run's figures go: `metrics.jsonl` is the truth, the console and W&B follow it.

A `Tracker` holds sinks; on ranks other than 0 it holds none, so that the loop never asks which rank it is on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sftdist.core.storage import naming

METRICS = "metrics.jsonl"
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
    """Atomically drop the lines of steps after `step`, which a resumed run makes again; lines without a step stay.

    A kill leaves a last line unfinished and a power cut may leave garbage: the file ends at the first line that is
    not whole. Nothing of a checkpoint is lost by that, for the file is synced before each.
    """
    kept = [text for text, line in _whole_lines(path) if line.get("step", 0) <= step]
    temporary = path.with_name(path.name + ".cut")
    with naming(path), temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def evaluation_losses(run_dir: Path) -> dict[int, float]:
    """`eval/loss` by step, from the whole lines of `metrics.jsonl`; nothing where there is no such file."""
    path = run_dir / METRICS
    lines = _whole_lines(path) if path.is_file() else iter(())
    return {line["step"]: float(line["eval/loss"]) for _, line in lines if line["kind"] == "eval"}


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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
