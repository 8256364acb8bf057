"""A run's `metrics.jsonl`, and what a watch found of its checkpoints, as those read them who did not write them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sftdist.core.storage import read_jsonl

METRICS = "metrics.jsonl"
REPORTS = "report"  # the folder of evaluations in the run directory
WATCHED = f"{REPORTS}/watch.jsonl"  # the metrics of each checkpoint that `evaluate watch=true` has scored
BETTER = "higher_is_better"  # of each metric of such a line


def last_figures(run_dir: Path) -> dict[str, float]:
    """The last value of every number in the run's lines; empty where there is no file."""
    found: dict[str, float] = {}
    for line in lines(run_dir):
        found |= {key: known for key, value in line.items() if (known := number(value)) is not None}
    return found


def losses(run_dir: Path) -> dict[str, float | None]:
    """`first` and `last` training loss, and the last `eval` loss; None for each that there is not (yet).

    Only the lines that it takes are parsed, so that a folder of long runs is listed at once.
    """
    path = run_dir / METRICS
    raw = path.read_bytes().splitlines() if path.is_file() else []
    first, last = _first(raw, "train"), _first(raw[::-1], "train")
    found = {"first": first.get("loss"), "last": last.get("loss"), "eval": _first(raw[::-1], "eval").get("eval/loss")}
    return {name: number(value) for name, value in found.items()}


def _first(raw: list[bytes], kind: str) -> dict[str, Any]:
    """The first whole line of a kind: a kill leaves half a line, and a power cut garbage, at the end."""
    for line in raw:
        if f'"{kind}"'.encode() in line:
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and found.get("kind") == kind:
                    return found
    return {}


def lines(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every line, each with its `kind` and `step`; nothing where there is no file."""
    path = run_dir / METRICS
    return read_jsonl(path) if path.is_file() else iter(())


def watched(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The checkpoints that a watch has scored: `kind` probe, `step`, each metric by name, and under `BETTER` for each
    metric whether higher is better (None: it describes only). Nothing where there is no file."""
    path = run_dir / WATCHED
    return read_jsonl(path) if path.is_file() else iter(())


def number(value: Any) -> float | None:
    """A value as a number, None where it is none.

    JSON has no word for a non-finite number: it stands there as a string.
    """
    if value in ("nan", "inf", "-inf"):
        return math.nan if value == "nan" else float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
