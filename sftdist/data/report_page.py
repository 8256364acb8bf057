"""`report.html`: the data report as one page without any outside file or script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from sftdist.core.storage import write_json, write_text
from sftdist.data.pages import page_template
from sftdist.data.report_charts import Histogram, axis_of, bar, histogram
from sftdist.data.report_verdict import KEPT, NOTES, WORDS, percent, rows, stage_name
from sftdist.data.store import SPLITS

PAGE = "report.html"
SHOWN_CHARACTERS = 3000  # of a sample conversation
SHOWN_OF_PAIR = 800
SHOWN_ITEMS = 10  # of a list
SIGNS = {"fit": "✓", "look": "!", "unfit": "✗"}
NOTE_SIGNS = {**SIGNS, "fit": "·"}
# Sections that other parts fill, in the order of the page; whatever they hold is shown as plain tables.
PER_SOURCE = {
    "rules": "Normalising rules: rows changed",
    "lint": "Style and language",
    "contract": "Contracts",
}
OVER_ALL = {
    "leaks": "Leaks: train rows in or near held-out rows",
    "contamination": "Evaluation prompts kept out of training",
    "holdout": "Holdout",
    "manifest": "Data manifest",
}


def page(report: Mapping[str, Any]) -> str:
    """The page of a judged report (see `report_verdict.judged`); everything from the data is escaped."""
    template = page_template("report.html", {"percent": percent, "rows": rows, "stage": stage_name})
    return template.render(
        report=report,
        words=WORDS,
        signs=SIGNS,
        notes=NOTES,
        note_signs=NOTE_SIGNS,
        splits=SPLITS,
        lengths=list(_lengths(report)),
        funnels={name: list(_funnel(source["stages"])) for name, source in report["sources"].items()},
        pairs={name: twins for name, source in report["sources"].items() if (twins := list(_pairs(source)))},
        coverage=list(_coverage(report)),
        per_source={
            title: found
            for key, title in PER_SOURCE.items()
            if (found := {name: source[key] for name, source in report["sources"].items() if source.get(key)})
        },
        over_all={title: report[key] for key, title in OVER_ALL.items() if report.get(key)},
        samples=list(_samples(report["conversations"])),
        shown_items=SHOWN_ITEMS,
        bar=bar,
    )


def _pairs(source: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Per stage a few rows with their twins, and whether they left or were only found."""
    for stage, pairs in source.get("examples", {}).items():
        if pairs:
            name = stage_name(stage)
            left = source["stages"].get(stage, {"rows": 0})["rows"]
            number = left or source.get("found", {}).get(stage, len(pairs))
            shown = [
                {**pair, "text": _short(pair.get("text")), "twin_text": _short(pair.get("twin_text"))} for pair in pairs
            ]
            yield {"title": name, "left": bool(left), "rows": number, "pairs": shown}


def _short(text: str | None) -> str:
    return "" if text is None else text if len(text) <= SHOWN_OF_PAIR else f"{text[:SHOWN_OF_PAIR]} ..."


def _lengths(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A histogram per source, all on one axis, with what `data.max_len` would take."""
    training = report.get("training", {})
    mark = training.get("max_len")
    sources = report["sources"]
    charts = {
        name: Histogram([lengths["from"][0] - 1, *lengths["to"]] if lengths["rows"] else [], lengths["rows"])
        for name, source in sources.items()
        for lengths in [source["lengths"]]
    }
    axis = axis_of(list(charts.values()), mark)
    for name, source in sources.items():
        over = training.get("over", {}).get(name)
        middle = source["lengths"]["quantiles"].get("0.5")
        label = f"{name}: lengths of {source['stages']['train']['rows']:,} train rows"
        label += f", half of them up to {middle:,} tokens" if middle else ""
        yield {
            "name": name,
            "chart": histogram(charts[name], axis, mark, label),
            "quantiles": source["lengths"]["quantiles"],
            "longest": source["longest"],
            "over": over,
            "targets": source["stages"]["train"]["targets"],
        }


def _funnel(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A bar per stage that holds rows: what is kept from the left on, and what left at the place where it left.

    A row may be expanded into several, so that more are kept than were read: the widest count is the whole width.
    """
    whole = max([stages["read"]["rows"], stages["kept"]["rows"], 1])
    rest = stages["read"]["rows"]
    for stage, count in stages.items():
        number = count["rows"]
        if not number and stage not in ("read", "kept", "train"):
            continue
        gone = stage not in KEPT
        rest -= number if gone else 0
        shares = [("nothing", max(0, rest) / whole), ("lost", number / whole)] if gone else [("kept", number / whole)]
        label = f"{stage_name(stage)}: {rows(number)}"
        yield {"stage": stage, "gone": gone, "part": stage in SPLITS, "bar": bar(shares, label), **count}


def _coverage(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Per kind of label (tags, origins) a table of train rows by source, with the number that is required."""
    sources, required = report["sources"], report.get("required", {})
    for kind, title in (("tags", "Tags"), ("origins", "Label origins")):
        counts = {name: source.get("coverage", {}).get(kind, {}) for name, source in sources.items()}
        labels = sorted({label for found in counts.values() for label in found} | set(required.get(kind, {})))
        lines = []
        for label in labels:
            each = [found.get(label, 0) for found in counts.values()]
            least = required.get(kind, {}).get(label)
            lines.append({"label": label, "each": each, "all": sum(each), "least": least})
        if lines:
            yield {"title": title, "sources": list(counts), "lines": lines}


def _samples(conversations: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """`first`: of its source, which is shown without a click."""
    before = ""
    for sample in conversations:
        yield {**sample, **_cut(sample["runs"]), "first": sample["source"] != before}
        before = sample["source"]


def _cut(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs of a conversation up to so many characters, and how many more there are."""
    starts = [0, *accumulate(len(run["text"]) for run in runs)]
    shown = [
        {**run, "text": run["text"][: SHOWN_CHARACTERS - start]}
        for run, start in zip(runs, starts, strict=False)
        if start < SHOWN_CHARACTERS
    ]
    return {"runs": shown, "more": max(0, starts[-1] - SHOWN_CHARACTERS)}


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html` and, with the same figures, `report.json`; the path of the page."""
    file = folder / PAGE
    write_json(file.with_suffix(".json"), report)
    write_text(file, page(report))
    return file
