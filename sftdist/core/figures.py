"""A run's `metrics.jsonl`, as those read it who did not write it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sftdist.core.storage import read_jsonl

METRICS = "metrics.jsonl"


def last_figures(run_dir: Path) -> dict[str, float]:
    """The last value of every number in the run's lines; empty where there is no file."""
    path = run_dir / METRICS
    found: dict[str, float] = {}
    for line in read_jsonl(path) if path.is_file() else ():
        found |= {key: number for key, value in line.items() if (number := _number(value)) is not None}
    return found


def _number(value: Any) -> float | None:
    """JSON has no word for a non-finite number: it stands there as a string."""
    if value in ("nan", "inf", "-inf"):
        return math.nan if value == "nan" else float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
