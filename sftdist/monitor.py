"""The `monitor` command: live traffic against the profile of a release, and the release against itself, for cron.

Exit 0: nothing has changed; 4: drift, or a regression on the holdout; 2 and 3 as everywhere.

`sftdist monitor release=support-bot@v3 traffic=live.jsonl`, or `run(cfg)` from Python.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from sftdist.core import config
from sftdist.core.distributed import session
from sftdist.core.errors import GateError
from sftdist.core.releases import Release, find
from sftdist.core.settings import MonitorConfig, PublishConfig
from sftdist.core.snapshot import read_config
from sftdist.core.storage import append_jsonl, read_jsonl, write_json, write_jsonl
from sftdist.evals.endpoint import Endpoint
from sftdist.evals.label_sample import sample
from sftdist.evals.live import CONTRACTS, Forms
from sftdist.evals.looks import look
from sftdist.evals.monitor_page import write_page
from sftdist.evals.monitoring import Compared, compare, monitor_report, summary_lines
from sftdist.evals.profile import PROFILE, Profile
from sftdist.evals.regression import (
    decoding_of,
    findings,
    from_endpoint,
    from_folder,
    measures_of,
    prompts_again,
    regression_report,
    regressions,
    voice_of,
)
from sftdist.evals.report import REPORT as EVALUATION
from sftdist.evals.report import ROWS, EvalReport
from sftdist.evals.traffic import read_traffic
from sftdist.release.changelog import REPORT_FOLDER
from sftdist.release.registry import require_unchanged

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
    """Compare, write the report, its page and the rows to label. Raises DataError for traffic that says nothing, and
    GateError for a release that is not what was published."""
    release = find(Path(cfg.registry), str(cfg.release))
    require_unchanged(release, [PROFILE, f"{CONTRACTS}/"])
    profile = Profile.read(release.path / PROFILE)
    traffic = read_traffic(_paths(cfg.traffic))
    forms = Forms.read(release.path)
    compared = compare(profile, forms, traffic)
    report = monitor_report(str(release), profile, traffic, compared)
    report["to_label"] = _to_label(cfg, compared)
    if cfg.regression:
        report |= _regression(cfg, release, forms, report["findings"])
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
    if cfg.endpoint is not None and not cfg.regression:
        found.append("endpoint: given without regression=true, which is what asks it; add that, or leave endpoint out")
    if not _paths(cfg.traffic):
        found.append("traffic: given nothing, required JSONL files of live prompts, such as traffic=live.jsonl")
    return found


def _regression(cfg: MonitorConfig, release: Release, forms: Forms, already: list[str]) -> dict[str, Any]:
    """Ask the holdout's prompts again, by the settings of publish; the look is counted beside the data, where that is
    on this machine. Raises GateError where files of the release are not what they were."""
    require_unchanged(release, [f"{REPORT_FOLDER}/"])
    folder = release.path / REPORT_FOLDER
    published = EvalReport.read(folder / EVALUATION)
    prompts = prompts_again(read_jsonl(folder / ROWS))
    decided = read_config(folder, PublishConfig)
    data = Path(decided.data.store_dir)
    look(data if data.is_dir() else release.path.parent / "monitor", release.path)
    if cfg.endpoint is not None:
        key = os.environ.get(cfg.evals.judge.key_variable)
        endpoint = Endpoint(cfg.endpoint, cfg.endpoint_model, key)
        voice = voice_of(release.path, decided)
        asked, said = cfg.endpoint, from_endpoint(endpoint, prompts, published.decoding["max_new_tokens"], voice)
    else:
        require_unchanged(release)
        with session() as world:
            decoding = decoding_of(published, world)
            asked = str(release.path)
            said = from_folder(release.path, prompts, decoding, voice_of(release.path, decided), world)
    found = regressions(published, prompts, said, measures_of(release.path, forms, decided.evals))
    worse = findings(found)
    return {
        "findings": [*already, *worse],
        "regressed": bool(worse),
        "regression": regression_report(asked, prompts, found, published),
    }


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
    logging.disable_progress_bar()
    found = run(cfg)
    console = Console(highlight=False)
    for line in (*summary_lines(found.report), f"the report: {found.page}"):
        console.print(line, markup=False, soft_wrap=True)
    return GateError.exit_code if found.changed else 0


def main() -> int:
    """The command line: `sftdist monitor release=NAME@vN traffic=FILE [to_label=FILE] [regression=true]`."""
    return config.main(MonitorConfig, command, "monitor", checks=[issues])


if __name__ == "__main__":
    sys.exit(main())
