"""The `monitor` command: live traffic against the profile of a release, for cron: exit 0 no drift, 4 drift.

`sftdist monitor release=support-bot@v3 traffic=live.jsonl`, or `run(cfg)` from Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sftdist.core import config
from sftdist.core.errors import GateError
from sftdist.core.settings import MonitorConfig
from sftdist.core.storage import append_jsonl, write_json, write_jsonl
from sftdist.evals.label_sample import sample
from sftdist.evals.live import Forms
from sftdist.evals.monitor_page import write_page
from sftdist.evals.monitoring import Compared, compare, monitor_report, summary_lines
from sftdist.evals.profile import PROFILE, Profile
from sftdist.evals.traffic import read_traffic
from sftdist.release.registry import Release, find

REPORT = "monitor.json"
HISTORY = "history.jsonl"  # a line per look


@dataclass(frozen=True)
class Monitored:
    """What a look found, and where its report is. `changed`: drift or a regression."""

    report: dict[str, Any]
    folder: Path
    page: Path

    @property
    def changed(self) -> bool:
        return bool(self.report["drift"] or self.report["regressed"])


def run(cfg: MonitorConfig) -> Monitored:
    """Compare, write the report, its page and the rows to label. Raises DataError for traffic that says nothing."""
    release = find(Path(cfg.registry), str(cfg.release))
    profile = Profile.read(release.path / PROFILE)
    traffic = read_traffic(_paths(cfg.traffic))
    compared = compare(profile, Forms.read(release.path), traffic)
    report = monitor_report(str(release), profile, traffic, compared)
    report["to_label"] = _to_label(cfg, compared)
    folder = folder_of(cfg, release)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT, report)
    append_jsonl(folder / HISTORY, [_line(report)])
    return Monitored(report, folder, write_page(report, folder))


def folder_of(cfg: MonitorConfig, release: Release) -> Path:
    """Where the report goes: never into the release, whose files are not changed."""
    if cfg.report is not None:
        return Path(cfg.report).expanduser()
    return release.path.parent / "monitor" / f"v{release.version}"


def issues(cfg: MonitorConfig) -> list[str]:
    """What a look needs beside what every configuration does."""
    found = []
    if cfg.release is None:
        found.append("release: given nothing, required NAME@vN, NAME (the latest) or the folder of a release")
    if not _paths(cfg.traffic):
        found.append("traffic: given nothing, required JSONL files of live prompts, such as traffic=live.jsonl")
    return found


def _to_label(cfg: MonitorConfig, compared: Compared) -> dict[str, Any] | None:
    if cfg.to_label is None:
        return None
    file = Path(cfg.to_label).expanduser()
    rows = sample(compared.out, cfg.to_label_rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, rows)
    return {"file": str(file), "rows": len(rows)}


def _line(report: dict[str, Any]) -> dict[str, Any]:
    """A look in the history: what was counted, and what each statistic said."""
    return {
        "time": report["created"],
        "prompts": report["traffic"]["rows"],
        "drift": report["drift"],
        "regressed": report["regressed"],
        "chance": {one["name"]: one["adjusted"] for one in report["statistics"]},
    }


def _paths(traffic: Any) -> list[str]:
    return [traffic] if isinstance(traffic, str) else [str(entry) for entry in traffic or ()]


def command(cfg: MonitorConfig) -> int:
    """Look, say what was found, and exit: 0, or 4 where something has changed."""
    found = run(cfg)
    console = Console(highlight=False)
    for line in (*summary_lines(found.report), f"the report: {found.page}"):
        console.print(line, markup=False, soft_wrap=True)
    return GateError.exit_code if found.changed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: `sftdist monitor release=NAME@vN traffic=FILE [to_label=FILE] [regression=true]`."""
    return config.main(MonitorConfig, command, "monitor", argv, checks=[issues])


if __name__ == "__main__":
    sys.exit(main())
