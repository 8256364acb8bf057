"""`report.html`: what an evaluation found, as one page without any outside file or script, made for who decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftdist.core.runfacts import RunFacts
from sftdist.core.storage import write_text
from sftdist.data.pages import page_template
from sftdist.data.report_charts import bar
from sftdist.data.report_verdict import percent, rows
from sftdist.evals.advice import SHOWN as SLICES
from sftdist.evals.advice import Advice
from sftdist.evals.intervals import Estimate, Figures
from sftdist.evals.page_charts import Line, axis_of, interval_chart, interval_key, line_chart, line_key
from sftdist.evals.page_examples import Example, chosen, compared, regressions, worst_answers
from sftdist.evals.report import REPORT, ROWS, EvalReport, Scores
from sftdist.evals.summary import verdict

PAGE = "report.html"
SHOWN_ITEMS = 10  # of a list of figures
SHOWN_EXAMPLES = 20
OPENED = 3  # of them
SHOWN_OF_RULE = 3
SHOWN_METRICS = 300
SHOWN_CHANGES = 6  # of the metrics that fell or rose most, at the top
SHOWN_SOURCES = 6  # curves of the loss
SHOWN_MESSAGES = 4  # of a prompt: the first and the last ones
SHOWN_CHARACTERS = 1500  # of a text
TITLES = {"passed": "Passed", "failed": "Not passed", "refused": "Not decided", "none": "No gate"}
LEVELS = {"passed": "fit", "failed": "unfit", "refused": "look", "skipped": "note", "none": "look"}
SIGNS = {"passed": "✓", "failed": "✗", "refused": "!", "skipped": "·", "none": "!"}
SETS = ("all", "", "safety", "adversarial", "robustness", "benchmarks")  # the order of the groups; "": a source


def write_page(
    report: EvalReport,
    rows: Iterable[Mapping[str, Any]],
    figures: Mapping[str, Figures],
    folder: Path,
    *,
    decision: Mapping[str, Any] | None = None,
    advice: Advice | None = None,
    run: RunFacts | None = None,
    confidence: float = 0.95,
) -> Path:
    """Write `folder/report.html`, with bounds on all that is shown; its path.

    `rows` are those of rows.jsonl. `figures`: of the metrics of `report` that have no fault, with intervals of
    `confidence`. `decision`: the gate's as JSON, None where it has no rules.
    """
    file = folder / PAGE
    text = page(report, rows, figures, decision=decision, advice=advice, run=run, confidence=confidence)
    write_text(file, text.encode("utf-8", "replace").decode("utf-8"))  # half a surrogate pair is no text
    return file


def page(
    report: EvalReport,
    rows_read: Iterable[Mapping[str, Any]],
    figures: Mapping[str, Figures],
    *,
    decision: Mapping[str, Any] | None = None,
    advice: Advice | None = None,
    run: RunFacts | None = None,
    confidence: float = 0.95,
) -> str:
    """The page; whatever comes from data is escaped."""
    thresholds = _thresholds(decision)
    found = list(rows_read)
    fallen = regressions(found, report.metrics)
    shown = chosen(fallen, SHOWN_EXAMPLES)
    template = page_template("evaluation.html", {"percent": percent, "rows": rows, "value": _value})
    return template.render(
        report=report,
        run=run,
        confidence=f"{confidence:.4g}" if confidence < 0.5 else f"{100 * confidence:.4g} %",
        gate=_gate(decision),
        changes=_changes(report.metrics, figures, confidence),
        groups=_groups(report.metrics, figures, thresholds),
        unshown=max(0, len(report.metrics) - SHOWN_METRICS),
        fallen=len(fallen),
        examples=[_example(one) for one in shown],
        opened=_first_of_each(shown)[:OPENED],
        failing=list(_failing(decision, found, report.metrics)),
        advice=advice,
        weak=[] if advice is None else advice.weak[:SLICES],
        curves=[] if run is None else list(_curves(run)),
        data=_data(run),
        measured=_measured(report),
        report_file=REPORT,
        rows_file=ROWS,
        shown_items=SHOWN_ITEMS,
        signs=SIGNS,
        levels=LEVELS,
        bar=bar,
        line_key=line_key,
        interval_key=interval_key,
    )


def _value(value: float) -> str:
    """Three places after the point, fewer for large numbers."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.4g}"


# --- the gate -----------------------------------------------------------------------------------------


def _gate(decision: Mapping[str, Any] | None) -> dict[str, Any]:
    """The state in a word, why, and the rules: those that stop the model, and the others."""
    if decision is None:
        return {"state": "none", "title": TITLES["none"], "reasons": [], "stopping": [], "others": [], "counts": {}}
    verdicts = decision["verdicts"]
    counts = {outcome: sum(one["outcome"] == outcome for one in verdicts) for outcome in LEVELS}
    state = "passed" if decision["passed"] else "failed" if counts["failed"] else "refused"
    order = ["failed", "refused", "skipped", "passed"]
    ordered = sorted(verdicts, key=lambda one: order.index(one["outcome"]))
    return {
        "state": state,
        "title": TITLES[state],
        "reasons": decision["reasons"],
        "stopping": [one for one in ordered if one["outcome"] in ("failed", "refused")],
        "others": [one for one in ordered if one["outcome"] in ("skipped", "passed")],
        "counts": counts,
    }


def _thresholds(decision: Mapping[str, Any] | None) -> dict[str, float]:
    """What a rule of the gate asks of the tuned model, by metric; a rule on another model asks relative to that."""
    found: dict[str, float] = {}
    for one in [] if decision is None else decision["verdicts"]:
        if one["threshold"] is not None:
            found[one["metric"]] = one["threshold"] + (one["other"] or 0.0)
    return found


# --- metrics ------------------------------------------------------------------------------------------


def _changes(metrics: Mapping[str, Scores], figures: Mapping[str, Figures], confidence: float) -> dict[str, Any]:
    """How many metrics are better and worse than the base's beyond doubt, and which moved most."""
    found: dict[bool | None, list[dict[str, Any]]] = {True: [], False: [], None: []}
    for name, one in figures.items():
        if one.change is not None and one.base is not None and metrics[name].higher_is_better is not None:
            moved = {"name": name, "base": one.base.value, "tuned": one.tuned.value, "change": one.change}
            found[verdict(one.change, metrics[name].higher_is_better)].append(
                {**moved, "size": _size(one, metrics[name])}
            )
    better, worse = (sorted(found[sign], key=lambda one: -one["size"]) for sign in (True, False))
    return {
        "better": better[:SHOWN_CHANGES],
        "worse": worse[:SHOWN_CHANGES],
        "by_chance": round((1 - confidence) * sum(map(len, found.values()))),
        "counts": {"better": len(better), "worse": len(worse), "unclear": len(found[None])},
    }


def _size(one: Figures, scores: Scores) -> float:
    """How large a change is, in shares of what the metric spans, so that metrics compare."""
    change = 0.0 if one.change is None else abs(one.change.value)
    if scores.low is not None and scores.high is not None:
        return change / (scores.high - scores.low)
    return change / (abs(one.base.value) or 1.0) if one.base is not None else change


def _groups(
    metrics: Mapping[str, Scores], figures: Mapping[str, Figures], thresholds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The metrics by source or set of prompts."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, scores in list(metrics.items())[:SHOWN_METRICS]:
        group, _, short = name.partition(".")
        found.setdefault(group, []).append(_metric(short, scores, figures.get(name), thresholds.get(name)))
    known = [name for name in SETS if name]
    order = {name: SETS.index(name if name in known else "") for name in found}
    return [{"name": name, "metrics": found[name]} for name in sorted(found, key=lambda name: order[name])]


def _metric(short: str, scores: Scores, one: Figures | None, threshold: float | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": short,
        "meaning": scores.meaning,
        "fault": None,
        "says": None,
        "threshold": threshold,
    }
    if one is None:
        return {**shown, "fault": scores.fault() or "no figure was made"}
    better = verdict(one.change, scores.higher_is_better)
    shown["says"] = {True: "better", False: "worse", None: ""}[better]
    shown["direction"] = {True: "higher is better", False: "lower is better", None: "describes"}[
        scores.higher_is_better
    ]
    inside = [one.tuned] if one.base is None else [one.tuned, one.base]
    axis = axis_of(scores.low, scores.high, inside, *([] if threshold is None else [threshold]))
    chart = interval_chart(one.base, one.tuned, axis, _said(short, one), threshold)
    return {**shown, "figures": one, "chart": chart}


def _said(name: str, one: Figures) -> str:
    base = "" if one.base is None else f"base {_interval(one.base)}, "
    return f"{name}: {base}tuned {_interval(one.tuned)}"


def _interval(one: Estimate) -> str:
    return f"{_value(one.value)} ({_value(one.low)} to {_value(one.high)})"


# --- prompts to read ----------------------------------------------------------------------------------


def _example(one: Example) -> dict[str, Any]:
    row = one.row
    base, tuned = compared(_short(row["base"] or ""), _short(row["tuned"]))
    messages = row["prompt"]
    left = max(0, len(messages) - SHOWN_MESSAGES)
    shown = [*messages[:1], *messages[1 + left :]] if left else messages
    return {
        "id": row["id"],
        "tags": row["tags"][:SHOWN_ITEMS],
        "falls": one.falls[:SHOWN_ITEMS],
        "messages": [{"role": message["role"], "content": _short(message["content"])} for message in shown],
        "left_out": left,
        "reference": None if row["reference"] is None else _short(row["reference"]),
        "answers": [
            {"who": who, "pieces": pieces, "finished": row["finished"][who]}
            for who, pieces in (("base", base), ("tuned", tuned))
        ],
    }


def _short(text: str) -> str:
    more = len(text) - SHOWN_CHARACTERS
    return text if more <= 0 else f"{text[:SHOWN_CHARACTERS]} ... ({more:,} more characters)"


def _first_of_each(examples: Sequence[Example]) -> list[str]:
    """The ids of the worst prompt of each source."""
    return list({one.row["source"]: str(one.row["id"]) for one in reversed(examples)}.values())[::-1]


def _failing(
    decision: Mapping[str, Any] | None, found: Sequence[Mapping[str, Any]], metrics: Mapping[str, Scores]
) -> Iterator[dict[str, Any]]:
    """Answers behind the rules that stop the model by themselves; where it is held against another, see regressions."""
    for one in [] if decision is None else decision["verdicts"]:
        if one["outcome"] in ("failed", "refused") and one["other"] is None and one["metric"] in metrics:
            worst = worst_answers(found, one["metric"], metrics[one["metric"]])
            if worst:
                examples = [_example(row) for row in worst[:SHOWN_OF_RULE]]
                yield {"rule": one["rule"], "outcome": one["outcome"], "rows": len(worst), "examples": examples}


# --- the run ------------------------------------------------------------------------------------------


def _curves(run: RunFacts) -> Iterator[dict[str, Any]]:
    """Losses by source, learning rate, speed: those that the run has."""
    names = [one.name for one in sorted(run.mixture, key=lambda one: -(one.share or 0.0))]
    for key, title, dots in (
        ("loss/{}", "Training loss by source", False),
        ("eval/loss/{}", "Evaluation loss by source", False),
    ):
        lines = [
            Line(name, run.curves[key.format(name)], style, dots)
            for style, name in enumerate(names[:SHOWN_SOURCES])
            if key.format(name) in run.curves
        ]
        if lines:
            yield _chart(title, lines, more=len(names) - SHOWN_SOURCES)
    for key, title in (("lr", "Learning rate"), ("tokens_per_second", "Tokens per second")):
        if key in run.curves:
            yield _chart(title, [Line(title.lower(), run.curves[key])], from_zero=True)


def _chart(title: str, lines: Sequence[Line], more: int = 0, *, from_zero: bool = False) -> dict[str, Any]:
    said = ", ".join(f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    return {
        "title": title,
        "lines": lines,
        "said": said,
        "more": max(0, more),
        "chart": line_chart(lines, f"{title}: {said}", from_zero=from_zero),
    }


def _data(run: RunFacts | None) -> list[dict[str, Any]]:
    """The key figures of each source from the data manifest of the run."""
    sources = {} if run is None else run.data.get("sources", {})
    return [
        {
            "name": name,
            "read": source["stages"].get("read", {}).get("rows"),
            "left": sum(count["rows"] for stage, count in source["stages"].items() if stage not in ("read", "kept")),
            **{split: source["splits"][split]["rows"] for split in ("train", "validation", "holdout")},
            "tokens": source["splits"]["train"]["tokens"],
            "supervised": source["splits"]["train"]["targets"],
            "licence": source["licence"],
            "origin": source["origin"],
        }
        for name, source in sources.items()
    ]


def _measured(report: EvalReport) -> dict[str, Any]:
    """How the figures were made."""
    models = {"tuned": report.tuned, "base": report.base}
    found = {
        "models": {name: {"path": one.path, "sha256": one.sha256} for name, one in models.items() if one is not None},
        "decoding": report.decoding,
        "data": report.data,
        "seconds": report.seconds,
        "versions": report.versions,
    }
    return {name: _bounded(section) for name, section in found.items()}


def _bounded(value: Any) -> Any:
    """The first entries of each mapping, and how many more there are."""
    if isinstance(value, str):
        return _short(value)
    if not isinstance(value, Mapping):
        return value
    kept = {str(key): _bounded(inner) for key, inner in list(value.items())[:SHOWN_ITEMS]}
    return {**kept, "...": f"{len(value) - len(kept):,} more in {REPORT}"} if len(value) > len(kept) else kept
