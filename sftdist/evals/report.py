"""The result of an evaluation: every score of every prompt, for the tuned model and for its base, as versioned JSON.

Averages and their intervals are made of these by `evals.intervals`; nothing here knows torch, so that the gate and the
registry can read reports where there is none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sftdist.core.errors import GateError
from sftdist.core.storage import read_json, write_json
from sftdist.evals.intervals import RESAMPLES, figures
from sftdist.evals.intervals import Estimate as Estimate  # release reads reports through this file alone
from sftdist.evals.intervals import Figures as Figures

REPORT_FORMAT = 1
ROUNDING = 1e-9
REPORT = "report.json"
ROWS = "rows.jsonl"  # a line per prompt: the prompt, the reference, both answers, their scores


@dataclass(frozen=True)
class Scores:
    """One metric over the prompts that it applies to, in the same order in `ids tuned base weights`.

    The figure of a model is Σ weight · value / Σ weight; without `weights` each prompt counts the same. `low` and
    `high` bound what a value can be; `higher_is_better` None: the metric describes and cannot be better or worse.
    """

    ids: list[str]
    tuned: list[float]
    base: list[float] | None = None
    weights: list[float] | None = None
    higher_is_better: bool | None = True
    low: float | None = 0.0
    high: float | None = 1.0
    meaning: str = ""  # a short sentence for people

    def figures(self, confidence: float = 0.95, resamples: int = RESAMPLES) -> Figures:
        """Both means and the change, with their intervals (`evals.intervals`)."""
        return figures(self, confidence, resamples)

    def fault(self) -> str | None:
        """Why no figure can be made of these, or None: a value that is no number, out of bounds, missing or twice."""
        models = {"the tuned model": self.tuned, "the base model": self.base}
        for who, values in models.items():
            if values is not None and (fault := self._fault_of(values)):
                return f"{who}: {fault}"
        if len(set(self.ids)) != len(self.ids):
            return f"given {len(self.ids) - len(set(self.ids))} prompts twice, required each once"
        if not self.ids:
            return "given no prompt, required one at least"
        weights = [1.0] * len(self.ids) if self.weights is None else self.weights
        if len(weights) != len(self.ids) or not all(_is_number(weight) and weight >= 0 for weight in weights):
            return "weights: given others than one number of at least 0 per prompt"
        return None if any(weights) else "weights: given 0 for every prompt, required one above 0"

    def _fault_of(self, values: list[float]) -> str | None:
        if len(values) != len(self.ids):
            return f"given {len(values)} values for {len(self.ids)} prompts, required one each"
        if wrong := [value for value in values if not _is_number(value)]:
            return f"given {len(wrong)} of {len(values)} values that are no number, such as {wrong[0]!r}"
        low, high = _or(self.low, -math.inf), _or(self.high, math.inf)
        # a mean of exact figures may lie beside its bound by a rounding
        if wrong := [value for value in values if not low - ROUNDING <= value <= high + ROUNDING]:
            return f"given {wrong[0]:g}, required values of {low:g} to {high:g}"
        return None


@dataclass(frozen=True)
class ModelFacts:
    """A model that answered: `sha256` of its files (`evals.identity`), and where it lay."""

    path: str
    sha256: str
    files: dict[str, str] = field(default_factory=dict)  # sha256 by name


@dataclass(frozen=True)
class EvalReport:
    """Metrics by name, `<source or set of prompts>.<metric>` such as `format.schema_valid`.

    `decoding`: engine, dtype, batch size, greedy or not, the most new tokens. `data`: what was asked: the split, the
    prompts per source, the key of each store, the version of the holdout's lock, how often the holdout was looked at.
    `run`: name, directory and configuration of the run, where there is one.
    """

    created: str  # UTC, ISO 8601
    split: str
    tuned: ModelFacts
    base: ModelFacts | None
    decoding: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, Scores]
    run: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)  # by a prompt's id: sha256 of all it says and is held against

    @property
    def sha256(self) -> str:
        """The hash of everything in it, values that are no numbers too."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> Path:
        """`folder/report.json`, in one step."""
        path = folder / REPORT
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": REPORT_FORMAT, **asdict(self)})
        return path

    @classmethod
    def read(cls, path: Path) -> EvalReport:
        """The report in a file. Raises GateError where it is none, or one of another version."""
        if not path.is_file():
            raise GateError(f"{path}: given no file, required the report of an evaluation; run sftdist evaluate first")
        found = read_json(path)
        if not isinstance(found, dict) or found.pop("format", None) != REPORT_FORMAT:
            raise GateError(f"{path}: given no report of format {REPORT_FORMAT}; run sftdist evaluate again")
        return cls(
            **{
                **found,
                "tuned": ModelFacts(**found["tuned"]),
                "base": _facts(found["base"]),
                "metrics": {name: Scores(**scores) for name, scores in found["metrics"].items()},
            }
        )


def _facts(found: Mapping[str, Any] | None) -> ModelFacts | None:
    return None if found is None else ModelFacts(**found)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _or(bound: float | None, other: float) -> float:
    return other if bound is None else bound
