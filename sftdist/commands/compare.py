"""`sftdist compare A B ...`, `sftdist compare --sweep DIR`: runs in one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sftdist.commands.compare_made import code_differences, data_differences, lines_of
from sftdist.commands.compare_page import curves_of, write_page
from sftdist.commands.compare_runs import Run, differences, figures_of, metrics_of, notes, readable, sorted_by
from sftdist.commands.compare_table import as_json, rows_of, table
from sftdist.core import snapshot
from sftdist.core.errors import ConfigError
from sftdist.core.storage import read_json
from sftdist.core.sweep import FILE as SWEEP


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 where an argument is wrong or a run cannot be read."""
    given = _parser().parse_args(argv)
    try:
        show(given.runs, given.sweep, given.metric, given.sort, given.confidence, in_json=given.json, html=given.html)
    except ConfigError as error:
        print(f"sftdist compare: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftdist compare",
        description="Runs in one table: mixture, steps, time of the steps, eval/loss, metrics of the validation split "
        "with intervals, the gate's preview, and what differs in their configuration, code and data.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="R", help="run directories, two or more")
    parser.add_argument("--sweep", type=Path, metavar="DIR", help=f"the runs of a sweep: the folder with {SWEEP}")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="a metric of the reports, such as general.rouge_l or '*.exact_match'; may be given again. "
        "Default: those of the gate's rules, else the main one of each source",
    )
    parser.add_argument("--sort", metavar="KEY", help="the best first: a metric, eval/loss, steps, seconds or label")
    parser.add_argument("--confidence", type=_share, default=0.95, help="of the intervals; default: 0.95")
    parser.add_argument("--json", action="store_true", help="everything as JSON, the curves too")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page of it, too, with the curves overlaid")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"given {text}, required a number between 0 and 1")
    return value


def show(
    run_dirs: Sequence[Path],
    sweep: Path | None,
    patterns: Sequence[str],
    sort: str | None,
    confidence: float,
    *,
    in_json: bool,
    html: Path | None = None,
) -> None:
    """Print the comparison, and write the page where one is asked for. Raises ConfigError with all that is wrong."""
    runs, waiting = _given(run_dirs, sweep)
    names = metrics_of(runs, patterns)
    wanted = [*names, sort] if sort and any(sort in run.report.metrics for run in runs if run.report) else names
    figures = {run.label: figures_of(run, list(dict.fromkeys(wanted)), confidence) for run in runs}
    if sort is not None:
        runs = sorted_by(runs, sort, figures)
    differing = differences(runs)
    (code, no_code), (data, no_data) = code_differences(runs), data_differences(runs)
    said = [*notes(runs, wanted), *no_code, *no_data, *waiting]
    cells = rows_of(runs, list(dict.fromkeys(wanted)), figures, differing)
    if html is not None:
        found = {"Configuration": differing, "Code and machine": code, "Data": data}
        write_page(html, [row[:-1] for row in cells], runs, found, said)
    if in_json:
        every = as_json(runs, figures, differing, said, code=code, data=data)
        for run, entry in zip(runs, every["runs"], strict=True):
            entry["curves"] = curves_of(run)
        print(json.dumps(every, indent=2, ensure_ascii=False, allow_nan=False))
        return
    for line in table(cells, [*lines_of("code and machine:", code), *lines_of("data:", data)], said):
        print(line)


def _given(run_dirs: Sequence[Path], sweep: Path | None) -> tuple[list[Run], list[str]]:
    """The runs, and a note for each job of the sweep that has none yet."""
    if (sweep is None) == (not run_dirs):
        raise ConfigError(
            "given neither runs nor a sweep, or both; required two run directories or more, or --sweep DIR"
        )
    folders, waiting = (list(run_dirs), []) if sweep is None else _of_sweep(sweep)
    twice = {str(path) for path in folders if [one.resolve() for one in folders].count(path.resolve()) > 1}
    if twice:
        raise ConfigError(f"given one run twice ({', '.join(sorted(twice))}); required each once")
    if sweep is None and len(folders) < 2:
        raise ConfigError(f"given one run ({folders[0]}); required two at least: sftdist runs {folders[0]} shows one")
    return readable(folders), waiting


def _of_sweep(sweep: Path) -> tuple[list[Path], list[str]]:
    """The run directories of a sweep, which are as its command was given them: from where that was called."""
    if not (sweep / SWEEP).is_file():
        raise ConfigError(
            f"{sweep}: given no {SWEEP} there; required the folder of a sweep, such as runs/sweep-1a2b3c4d"
        )
    found, waiting = [], []
    for job in read_json(sweep / SWEEP)["jobs"]:
        path = _there(sweep, job["run_dir"])
        if path is None:
            waiting.append(f"job {job['number']} ({' '.join(job['overrides'])}): {job['state']}, it has no run yet")
        elif path not in found:
            found.append(path)
    if not found:
        raise ConfigError(f"{sweep}: none of its jobs has a run yet")
    return found, waiting


def _there(sweep: Path, run_dir: str | None) -> Path | None:
    """Where it was, or beside the sweep's folder, where both were moved or this is called from somewhere else."""
    if run_dir is None:
        return None
    candidates = (Path(run_dir), sweep.resolve().parent / Path(run_dir).name)
    return next((path for path in candidates if (path / snapshot.FILE).is_file()), None)


if __name__ == "__main__":
    sys.exit(main())
