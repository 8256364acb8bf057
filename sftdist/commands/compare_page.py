"""`compare --html FILE`: the comparison as one page without any outside file or script, the curves over one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftdist.commands.compare_runs import Run
from sftdist.core.storage import write_text
from sftdist.core.typed import shown
from sftdist.data.pages import page_template
from sftdist.data.report_verdict import percent
from sftdist.evals.page_charts import SHAPES, Line, line_chart, line_key, thinned

# (key of metrics.jsonl, title, whether its points are shown, whether its axis begins at 0)
CURVES = (
    ("loss", "Training loss", False, False),
    ("eval/loss", "Evaluation loss", True, False),
    ("lr", "Learning rate", False, True),
    ("tokens_per_second", "Tokens per second", False, True),
)
MOST_LINES = len(SHAPES)  # in one chart: so many can be told apart without colours
OPEN = 40  # differences that a page shows at once


def write_page(
    file: Path,
    rows: Sequence[Sequence[str]],
    runs: Sequence[Run],
    differing: Mapping[str, Mapping[str, Mapping[str, Any]]],
    notes: Sequence[str],
) -> None:
    """Write the page. `rows`: the table, its head first; `differing`: by title (configuration, code, data)."""
    text = page(rows, runs, differing, notes)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text.encode("utf-8", "replace").decode("utf-8"))  # half a surrogate pair is no text


def page(
    rows: Sequence[Sequence[str]],
    runs: Sequence[Run],
    differing: Mapping[str, Mapping[str, Mapping[str, Any]]],
    notes: Sequence[str],
) -> str:
    """The page; whatever comes from a run is escaped."""
    head, *cells = rows
    template = page_template("compare.html", {"percent": percent, "cell": _cell})
    return template.render(
        head=head,
        cells=cells,
        runs=runs,
        labels=[run.label for run in runs],
        curves=list(charts(runs)),
        differing={title: found for title, found in differing.items() if found},
        notes=notes,
        line_key=line_key,
        open=OPEN,
        more=max(0, len(runs) - MOST_LINES),
        sources=list(dict.fromkeys(one.name for run in runs for one in run.facts.mixture)),
        mixed=len({frozenset((one.name, one.asked) for one in run.facts.mixture) for run in runs}) > 1,
        mixtures={run.label: {one.name: one for one in run.facts.mixture} for run in runs},
    )


def charts(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A chart for each curve that some run has; the first runs of the table, each with one style in all charts."""
    for key, title, dots, from_zero in CURVES:
        lines = [
            Line(run.label, run.facts.curves[key], style, dots)
            for style, run in enumerate(runs[:MOST_LINES])
            if run.facts.curves.get(key)
        ]
        if lines:
            said = ", ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
            chart = line_chart(lines, f"{title}: {said}", from_zero=from_zero)
            yield {"key": key, "title": title, "lines": lines, "chart": chart}


def curves_of(run: Run) -> dict[str, list[tuple[float, float]]]:
    """The same curves as numbers: (step, value), some hundred points at most, each the mean of a stretch."""
    return {key: thinned(run.facts.curves[key]) for key, *_ in CURVES if run.facts.curves.get(key)}


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else shown(value)
