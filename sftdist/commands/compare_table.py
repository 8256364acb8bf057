"""The table of `compare`, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from sftdist.commands.compare_runs import Run
from sftdist.core.sweep import DEFAULT_METRIC
from sftdist.core.table import columns
from sftdist.core.typed import shown

SHOWN_KEYS = 6
OFF = 0.02  # between a share asked for and the realised one, from which on both are shown
Figures = Mapping[str, Mapping[str, Any]]


def rows_of(
    runs: Sequence[Run],
    names: Sequence[str],
    figures: Mapping[str, Figures],
    differing: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, ...]]:
    """The head, and a row per run; the last cell says what differs in its configuration."""
    sources = list(dict.fromkeys(one.name for run in runs for one in run.facts.mixture))
    head = ("run", "state", "steps", "time", f"mix {'/'.join(sources)}", DEFAULT_METRIC, *names, "gate", "differs in")
    rows = [(*_row(run, sources, names, figures[run.label]), _differs(differing, run.label)) for run in runs]
    return [head, *rows]


def table(rows: Sequence[Sequence[str]], made: Sequence[str], notes: Sequence[str]) -> Iterator[str]:
    """For a terminal: a line per run, below what they were made with, and what to know about the figures."""
    yield from (line.rstrip() for line in columns(rows))
    yield from made
    if notes:
        yield ""
        yield from notes


def _differs(differing: Mapping[str, Mapping[str, Any]], label: str) -> str:
    """The keys that are not the same in all runs, and what this one has there."""
    said = [f"{key}={_plain(values[label])}" for key, values in differing.items()]
    more = len(said) - SHOWN_KEYS
    return " ".join([*said[:SHOWN_KEYS], *([f"and {more} more (--json has all)"] if more > 0 else [])])


def _row(run: Run, sources: Sequence[str], names: Sequence[str], figures: Figures) -> tuple[str, ...]:
    facts = run.facts
    unfinished = facts.planned is not None and facts.planned != facts.steps
    steps = f"{facts.steps}/{facts.planned}" if unfinished else str(facts.steps)
    loss = facts.last(DEFAULT_METRIC)
    cells = [_cell(figures.get(name)) for name in names]
    return (
        *(run.label, run.state, steps, str(timedelta(seconds=round(facts.seconds)))),
        *(_mixture(run, sources), "" if loss is None else f"{loss:.4f}"),
        *(*cells, run.gate),
    )


def _mixture(run: Run, sources: Sequence[str]) -> str:
    """`0.5/0.3/0.2`; behind it what it became, where that is another."""
    mixed = {one.name: one for one in run.facts.mixture}
    asked = [mixed[name].asked if name in mixed else 0.0 for name in sources]
    got = [mixed[name].share if name in mixed else 0.0 for name in sources]
    off = any(
        one is not None and other is not None and abs(one - other) > OFF for one, other in zip(asked, got, strict=True)
    )
    return _shares(asked) + (f" (became {_shares(got)})" if off else "")


def _shares(shares: Sequence[float | None]) -> str:
    return "/".join("-" if share is None else f"{share:.2f}" for share in shares)


def _cell(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{one['value']:.3f} [{one['low']:.2f}, {one['high']:.2f}]"


def _plain(value: Any) -> str:
    return "-" if value is None else shown(value)


def as_json(
    runs: Sequence[Run],
    figures: Mapping[str, Figures],
    differing: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
    *,
    code: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything that the table is made of."""
    return {
        "runs": [_entry(run, figures[run.label]) for run in runs],
        "differs": differing,
        "code": code,
        "data": data,
        "notes": list(notes),
    }


def _entry(run: Run, figures: Figures) -> dict[str, Any]:
    facts, decision, report = run.facts, run.decision, run.report
    stopping = (
        [] if decision is None else [one.rule for one in decision.verdicts if one.outcome in ("failed", "refused")]
    )
    loss = facts.last(DEFAULT_METRIC)
    return {
        "run": run.label,
        "dir": str(facts.path),
        "state": run.state,
        "steps": facts.steps,
        "planned": facts.planned,
        "seconds": facts.seconds,
        "tokens": facts.tokens,
        "mixture": {one.name: {"asked": one.asked, "realised": one.share} for one in facts.mixture},
        DEFAULT_METRIC: None if loss is None or not math.isfinite(loss) else loss,
        "model": None if report is None else report.tuned.sha256,
        "metrics": figures,
        "gate": {"state": run.gate, "passed": None if decision is None else decision.passed, "stopping": stopping},
        "fault": run.fault,
    }
