"""`monitor.html`: a look at live traffic as one page without any outside file or script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftdist.core.storage import write_text
from sftdist.data.pages import page_template
from sftdist.data.report_charts import bar
from sftdist.data.report_verdict import percent

PAGE = "monitor.html"


def page(report: Mapping[str, Any]) -> str:
    """The page of a report of `monitoring.monitor_report`; everything from the traffic is escaped."""
    template = page_template("monitor.html", filters={"percent": percent, "interval": _interval, "shares": _shares})
    return template.render(report=report, bar=bar, changed=report["drift"] or report["regressed"])


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder/monitor.html`; its path."""
    file = folder / PAGE
    write_text(file, page(report).encode("utf-8", "replace").decode("utf-8"))  # half a surrogate pair is no text
    return file


def _interval(one: Mapping[str, float] | None) -> str:
    """A figure with its interval."""
    return "" if one is None else f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def _shares(one: Mapping[str, float] | None) -> str:
    """A share with its interval."""
    return "" if one is None else f"{percent(one['value'])} ({percent(one['low'])} to {percent(one['high'])})"
