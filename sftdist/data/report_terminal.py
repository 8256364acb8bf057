"""The data report on a terminal: the verdict of each source, what to look at first, and where the page is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sftdist.data.report_verdict import NOTES, WORDS, percent

SHOWN_FINDINGS = 3  # of each source; the page has all
STYLES = {"fit": "green", "look": "yellow", "unfit": "bold red"}


def show_report(report: Mapping[str, Any], page: Path, console: Console) -> None:
    """Print the most important lines of a judged report."""
    table = Table("source", "verdict")
    for column in ("read", "train", "held out", "train tokens", "supervised"):
        table.add_column(column, justify="right")
    for name, source in report["sources"].items():
        stages, level = source["stages"], source["verdict"]["level"]
        train = stages["train"]
        table.add_row(
            Text(name),
            Text(WORDS[level], style=STYLES[level]),
            f"{stages['read']['rows']:,}",
            f"{train['rows']:,}",
            f"{stages['validation']['rows'] + stages['holdout']['rows']:,}",
            f"{train['tokens']:,}",
            percent(train["share"]) if train["tokens"] else "",
        )
    console.print(table)
    for name, source in report["sources"].items():
        _print_findings(name, source["verdict"]["findings"], console)
    _print_findings("all", report["verdict"]["findings"], console)
    plan = report.get("training", {}).get("plan")
    if plan:
        shares = ", ".join(f"{one['name']} {one['share']:.3f}" for one in plan["sources"])
        line = f"packs of {plan['pack_tokens']:,} tokens are {percent(plan['fill'])} full; realised mixture: {shares}"
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"The whole report: {page} (its figures: {page.with_suffix('.json').name})"), soft_wrap=True)


def _print_findings(name: str, findings: list[dict[str, str]], console: Console) -> None:
    for finding in findings[:SHOWN_FINDINGS]:
        line = f"{name}: {NOTES[finding['level']]}: {finding['text']}"
        console.print(Text(line, style="" if finding["level"] == "fit" else STYLES[finding["level"]]), soft_wrap=True)
    if len(findings) > SHOWN_FINDINGS:
        console.print(Text(f"{name}: {len(findings) - SHOWN_FINDINGS} more in the report"), soft_wrap=True)
