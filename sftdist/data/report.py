"""The data report: what came in, what left and why, what would be lost at which length, and rows to read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sftdist.data.problems import Problems, rows
from sftdist.data.store import SPLITS, TRAIN, TokenStore
from sftdist.data.template import ChatTemplate

REPORT_VERSION = 1
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SAMPLES = 10
SHOWN_CHARACTERS = 1200
STAGE_NAMES = {
    "read": "read",
    "left_out": "left out by the row function",
    "bad": "bad (cannot be parsed)",
    "duplicate": "exact duplicates",
    "held_out": "prompt is in the validation or holdout file",
    "refused": "refused (mask not proven)",
    "kept": "kept",
}


@dataclass(frozen=True)
class Preparation:
    """A store, whether it was there before, and which ingredients differ from the one before it."""

    store: TokenStore
    reused: bool
    changed: list[str]


def data_report(done: list[Preparation], problems: Problems, template: ChatTemplate) -> dict[str, Any]:
    """The report as JSON; `show_report` prints it."""
    shares = [SAMPLES // len(done) + (i < SAMPLES % len(done)) for i in range(len(done))]
    samples = [sample for found, n in zip(done, shares, strict=True) for sample in _samples(found.store, template, n)]
    return {
        "version": REPORT_VERSION,
        "sources": {found.store.name: _source(found) for found in done},
        "dropped": [
            {"kind": group.kind, "reason": group.reason, "rows": group.rows, "examples": group.examples}
            for group in sorted(problems.groups.values(), key=lambda group: (group.kind, -group.rows, group.reason))
        ],
        "conversations": samples,
    }


def _source(found: Preparation) -> dict[str, Any]:
    store = found.store
    stages = {name: store.manifest["counts"][name] for name in STAGE_NAMES} | store.manifest["splits"]
    return {
        "store": str(store.path),
        "reused": found.reused,
        "changed": found.changed,
        "stages": {
            name: {**count, "share": _share(count["targets"], count["tokens"])} for name, count in stages.items()
        },
        "lost_at_max_len": lost_at(store),
        "longest": int(store.lengths.max(initial=0)),
    }


def _share(targets: float, tokens: int) -> float | None:
    return round(targets / tokens, 4) if tokens else None


def lost_at(store: TokenStore) -> dict[str, dict[str, Any]]:
    """Train rows longer than each length, their tokens and supervised weight: what `overlong=drop` would lose."""
    train = store.split == TRAIN
    lengths, targets = store.lengths[train], store.targets[train]
    found = {}
    for length in LENGTHS:
        over = lengths > length
        found[str(length)] = {
            "rows": int(over.sum()),
            "tokens": int(lengths[over].sum()),
            "targets": float(targets[over].sum()),
        }
    return found


def _samples(store: TokenStore, template: ChatTemplate, count: int) -> list[dict[str, Any]]:
    """Rows spread evenly over the store, decoded, cut into runs of supervised and other text."""
    rows = np.unique(np.linspace(0, len(store) - 1, count).astype(int)) if len(store) else np.empty(0, int)
    return [
        {
            "source": store.name,
            "id": store.row_ids([int(row)])[0],
            "split": SPLITS[int(store.split[row])],
            "runs": decoded_runs(*store.tokens(int(row)), template),
        }
        for row in rows
    ]


def decoded_runs(ids: np.ndarray, weights: np.ndarray, template: ChatTemplate) -> list[dict[str, Any]]:
    """`{"text", "weight"}` for each stretch of tokens with the same weight."""
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    return [
        {"text": template.tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), "weight": float(weights[a])}
        for a, b in pairwise(borders)
    ]


def show_report(report: dict[str, Any], console: Console) -> None:
    """Print the report for a person: stages, losses by length, problems, and the first sample of each source."""
    for name, source in report["sources"].items():
        console.print(_stage_table(name, source))
    console.print(_length_table(report["sources"]))
    for group in report["dropped"]:
        console.print(f"{group['kind']}: {escape(group['reason'])}: {rows(group['rows'])}")
    shown: set[str] = set()
    for sample in report["conversations"]:
        if sample["source"] not in shown:
            shown.add(sample["source"])
            console.print(_sample_text(sample))


def _stage_table(name: str, source: dict[str, Any]) -> Table:
    title = f"{name}: {source['store']}" + (" (up to date)" if source["reused"] else "")
    table = Table("stage", title=title, title_justify="left")
    for column in ("rows", "tokens", "supervised", "share"):
        table.add_column(column, justify="right")
    for stage, count in source["stages"].items():
        if count["rows"] or stage in ("read", "train"):
            cells = (
                [f"{count['tokens']:,}", f"{count['targets']:,.0f}", f"{count['share']:.1%}"] if count["tokens"] else []
            )
            table.add_row(STAGE_NAMES.get(stage, f"  {stage}"), f"{count['rows']:,}", *cells)
    return table


def _length_table(sources: dict[str, Any]) -> Table:
    table = Table(
        "train rows longer than", title="lost at data.max_len (rows / tokens / supervised)", title_justify="left"
    )
    for name in sources:
        table.add_column(name, justify="right")
    for length in LENGTHS:
        lost = [source["lost_at_max_len"][str(length)] for source in sources.values()]
        table.add_row(f"{length:,}", *(f"{n['rows']:,} / {n['tokens']:,} / {n['targets']:,.0f}" for n in lost))
    return table


def _sample_text(sample: dict[str, Any]) -> Group:
    text = Text()
    for run in sample["runs"]:
        marked = f"⟦{run['text']}⟧" if run["weight"] else run["text"]  # visible in a log without colours too
        text.append(marked, style="bold green" if run["weight"] else "dim")
    text.truncate(SHOWN_CHARACTERS, overflow="ellipsis")
    head = Text(f"{sample['source']} {sample['id']} ({sample['split']}): ⟦this⟧ is trained", style="bold")
    return Group(head, text)
