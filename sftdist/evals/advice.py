"""What to fix next: what fell against the base model, which prompts fail most, and a mixture to try.

Of everything that was measured something falls by chance: a metric counts as fallen only where its interval, widened
for as many as were compared (Bonferroni), says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sftdist.core.table import columns
from sftdist.evals.intervals import Estimate, change
from sftdist.evals.probes.robustness import LOWER_IS_BETTER, PRIMARY
from sftdist.evals.remix import Mixture, propose
from sftdist.evals.report import EvalReport, Scores
from sftdist.evals.slices import Scored, Slice, weak_slices

SHOWN = 8  # slices


@dataclass(frozen=True)
class Fell:
    """A metric that is worse than the base model's: `change low high` are tuned minus base."""

    metric: str
    prompts: int
    change: float
    low: float
    high: float


@dataclass(frozen=True)
class Advice:
    """`weak`: the slices that score lowest beside the others of their source, the surest first. `mixture`: shares for
    the next run, or why there are none. `metrics` and `slices`: how many were compared."""

    fell: list[Fell]
    weak: list[Slice]
    mixture: Mixture | str
    metrics: int
    slices: int

    def to_plain(self) -> dict[str, Any]:
        """Figures by name, for a page or as JSON."""
        return {
            "metrics compared with base": self.metrics,
            "slices compared": self.slices,
            "fell": [asdict(one) for one in self.fell],
            "weak": [asdict(one) for one in self.weak[:SHOWN]],
            "mixture": {"proposed": self.mixture} if isinstance(self.mixture, str) else asdict(self.mixture),
        }

    def lines(self) -> list[str]:
        """For a terminal or a log; nothing where there is nothing to fix."""
        fell = [
            ("fell", one.metric, f"{one.change:+.3f} [{one.low:+.3f}, {one.high:+.3f}] against base")
            for one in self.fell
        ]
        weak = [
            (
                "weak",
                f"{one.source}.{one.metric}",
                f"{one.score:.3f} of {one.prompts} prompts ({one.name}), {one.others:.3f} of others",
            )
            for one in self.weak[:SHOWN]
        ]
        table = [line.rstrip() for line in columns([*fell, *weak])]
        if isinstance(self.mixture, Mixture):
            return [*table, *self.mixture.why, f"a mixture to try: {self.mixture.override}"]
        return [*table, *([self.mixture] if fell else [])]


def advise(
    report: EvalReport, rows: Sequence[Mapping[str, Any]], lambdas: Mapping[str, float], *, confidence: float = 0.95
) -> Advice:
    """From a report, its lines of rows.jsonl, and the lambdas that were trained with (none: no mixture is proposed)."""
    compared = {name: scores for name, scores in report.metrics.items() if _comparable(scores)}
    fell = [one for name in compared if (one := _fell(name, compared[name], confidence, len(compared)))]
    main = {source: name for source in _sources(rows) if (name := main_metric(source, report.metrics))}
    asked = [row for row in rows if row["variant"] is None and row["source"] in main]
    scored = [found for row in asked if (found := Scored.of(row, main[row["source"]]))]
    weak, slices = weak_slices(scored, confidence)
    falls = {one.metric.rpartition(".")[0]: -one.change for one in fell if one.metric in _full(main)}
    return Advice(sorted(fell, key=_size, reverse=True), weak, propose(lambdas, falls), len(compared), slices)


def main_metric(source: str, metrics: Mapping[str, Scores]) -> str | None:
    """The metric that says most about a source's answers, of those that most of its prompts have."""
    names = [name for name in PRIMARY if name not in LOWER_IS_BETTER and f"{source}.{name}" in metrics]
    return max(names, key=lambda name: len(metrics[f"{source}.{name}"].ids), default=None)


def _sources(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["source"] for row in rows))


def _full(main: Mapping[str, str]) -> set[str]:
    return {f"{source}.{name}" for source, name in main.items()}


def _comparable(scores: Scores) -> bool:
    return scores.base is not None and scores.higher_is_better is not None and scores.fault() is None


def _fell(name: str, scores: Scores, confidence: float, compared: int) -> Fell | None:
    """None where the widened interval does not say that it is worse; that is only made where the plain one says so."""
    found = None
    for level in (confidence, 1 - (1 - confidence) / compared):
        found = _change(scores, level)
        if (found.high if scores.higher_is_better else -found.low) >= 0:
            return None
    assert found is not None, "there are two levels"
    return Fell(name, len(scores.ids), found.value, found.low, found.high)


def _change(scores: Scores, confidence: float) -> Estimate:
    assert scores.base is not None, "comparable"
    return change(scores.tuned, scores.base, scores.weights, confidence, scores.low, scores.high)


def _size(fell: Fell) -> float:
    """How far from 0 the nearest end of the interval is."""
    return min(abs(fell.low), abs(fell.high))
