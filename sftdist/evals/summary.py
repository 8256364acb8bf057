"""What an evaluation found, in a few lines for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sftdist.core.table import columns
from sftdist.evals.intervals import Estimate, Figures

SIGNS = {True: "better", False: "worse", None: ""}


def summary(figures: Mapping[str, Figures], better: Mapping[str, bool | None]) -> Iterator[str]:
    """A table: base, tuned and the change with its interval, and where that says so, whether it is better or worse.

    `better`: whether a higher value of the metric is better; None where it cannot be.
    """
    rows = [("metric", "prompts", "base", "tuned", "change", "")]
    for name, one in figures.items():
        base = "" if one.base is None else f"{one.base.value:.3f}"
        change = "" if one.change is None else _signed(one.change)
        said = SIGNS[verdict(one.change, better[name])]
        rows.append((name, f"{one.n:,}", base, f"{one.tuned.value:.3f}", change, said))
    yield from (line.rstrip() for line in columns(rows))


def _signed(change: Estimate) -> str:
    return f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def verdict(change: Estimate | None, higher: bool | None) -> bool | None:
    """True for better, False for worse, None where the interval holds 0 or nobody can say."""
    if change is None or higher is None or change.low <= 0 <= change.high:
        return None
    return (change.low > 0) == higher
