"""The `prepare` command: raw rows become verified token stores, on the CPU, before any training job starts.

`sftdist prepare +exp=X`, `python -m sftdist.prepare +exp=X`, or `run(cfg)` from Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sftdist.assets import quickstart
from sftdist.core import config
from sftdist.core.errors import ConfigError, DataAbsentError, DataError
from sftdist.core.ranklog import takes_bar
from sftdist.core.settings import PrepareConfig, TrainConfig
from sftdist.core.storage import write_json
from sftdist.data.build import at_most_every
from sftdist.data.comparison import Comparison, compare, show_comparison
from sftdist.data.manifest import MANIFEST, Rows, left_at, read_manifest, rows_behind, rows_of
from sftdist.data.pipeline import Prepared, PrepareRequest, prepare, survey
from sftdist.data.planned import corpus_of, plan_spec
from sftdist.data.refusals import UnfitError
from sftdist.data.report_page import write_report
from sftdist.data.report_terminal import show_report
from sftdist.data.report_training import length_figures, plan_figures
from sftdist.data.report_verdict import judged
from sftdist.data.request import request_of as request_of_sections

REFRESH_SECONDS = 0.25


@dataclass(frozen=True)
class PrepareResult:
    """Where the store of each source is, those of `data.val` and `data.holdout` too, and the data report.

    `page`: the report as a page; its figures are in `report_file` beside it. `comparison`: with the manifest `diff`.
    """

    stores: dict[str, Path]
    report: dict[str, Any]
    report_file: Path
    page: Path
    manifest: Path
    comparison: Comparison | None = None


def run(cfg: PrepareConfig) -> PrepareResult:
    """Prepare the data of a config and print the report; `DataError` with all problems at once."""
    quickstart.lay_out(cfg)
    request = replace(request_of(cfg), lock=cfg.lock)
    other = None if cfg.diff is None else Path(cfg.diff).expanduser()
    before = None if other is None else read_manifest(other)  # first of all: it may be the file that is written below
    console = Console(highlight=False)
    say = partial(console.print, markup=False, soft_wrap=True)
    try:
        with ticking(console) as tick:
            prepared = prepare(request, say, tick)
    except UnfitError as problem:  # that is when the report is needed most
        page = write_report(judged({**problem.report, "refused": str(problem)}), request.store_dir)
        say(f"The report of this data: {page}")
        raise
    report = judged({**prepared.report, "training": training_figures(cfg, prepared)})
    page = write_report(report, request.store_dir)
    show_report(report, page, console)
    manifest = request.store_dir / MANIFEST
    write_json(manifest, prepared.manifest)
    comparison = None
    if other is not None and before is not None:
        comparison = compared(before, prepared, [other.parent, request.store_dir])
        console.print(f"\ncompared with {other}:", markup=False, soft_wrap=True)
        show_comparison(comparison, console)
    stores = {name: store.path for name, store in {**prepared.stores, **prepared.held_out}.items()}
    return PrepareResult(stores, report, page.with_suffix(".json"), page, manifest, comparison)


def compared(before: Mapping[str, Any], prepared: Prepared, folders: Sequence[Path]) -> Comparison:
    """What has changed since an earlier manifest, whose stores may be in any of these folders."""
    stores = {**prepared.stores, **prepared.held_out}
    now = Rows({name: rows_of(store) for name, store in stores.items()})
    return compare(
        before, prepared.manifest, rows_behind(before, folders), now, lambda name: left_at(stores[name].path)
    )


def training_figures(cfg: TrainConfig, prepared: Prepared) -> dict[str, Any]:
    """What the configured training would make of the stores; `not_computed` says why its plan cannot be made."""
    lengths = length_figures(prepared.stores, cfg.data.max_len, cfg.data.overlong.value)
    try:
        return {**lengths, "plan": plan_figures(corpus_of(cfg, prepared), plan_spec(cfg))}
    except (ConfigError, DataError) as problem:
        return {**lengths, "not_computed": str(problem)}


@contextmanager
def ticking(console: Console) -> Iterator[Callable[[str], None] | None]:
    """One line of a terminal that tells how far it is; elsewhere None, for lines now and then."""
    if not takes_bar(console.file):
        yield None
        return
    # Drawn by this thread alone: prepare forks its workers, and a fork copies locks that other threads hold.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        console.show_cursor(True)
        yield at_most_every(REFRESH_SECONDS, lambda text: live.update(Text(text, no_wrap=True), refresh=True))


def request_of(cfg: TrainConfig) -> PrepareRequest:
    """What a config asks prepare for."""
    return request_of_sections(cfg.data, cfg.model)


def show_plan(cfg: TrainConfig) -> None:
    """`dry_run=true`: which stores would be made, from how many rows; nothing is written."""
    try:
        todo = survey(request_of(cfg), at_most=sys.maxsize)
    except DataAbsentError as absent:
        print(f"the data is not there yet:\n{absent}")
        return
    missing = ", ".join(todo.missing)
    print(f"to tokenise: {missing}, {todo.rows:,} rows" if missing else "all stores are up to date")


def command(cfg: PrepareConfig) -> int:
    if cfg.dry_run:
        show_plan(cfg)
    else:
        run(cfg)
    return 0


def main() -> int:
    """The command line: `sftdist prepare [+exp=NAME] [key=value ...]`."""
    return config.main(PrepareConfig, command, "prepare")


if __name__ == "__main__":
    sys.exit(main())
