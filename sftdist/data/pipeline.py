"""The whole of prepare: sources in, one verified token store per source and a data report out.

A store is found by its content key, the hash of everything that changes its bytes and of nothing else, and knows of no
other store. What depends on several of them is laid over all: leaks, the locked holdout, the problems, the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

from sftdist.core.settings import OnFinding
from sftdist.data.build import SAY_EVERY_SECONDS, at_most_every
from sftdist.data.duplicates import CONTRADICTION
from sftdist.data.findings import BREACH, CUT_OFF
from sftdist.data.holdout import Data, settle
from sftdist.data.leaks import BAN, Overlay, leak_figures, overlay_of, refused_leaks
from sftdist.data.making import have_store
from sftdist.data.manifest import Provenance, data_manifest, left_at, rows_of
from sftdist.data.problems import Ban, Problems
from sftdist.data.refusals import (
    UnfitError,
    Watched,
    gather,
    limits_of,
    too_few,
    unsound,
    with_coverage,
)
from sftdist.data.report import data_report
from sftdist.data.sources import chunks
from sftdist.data.split import SPLIT_VERSION
from sftdist.data.store import TokenStore
from sftdist.data.tasks import (
    PrepareRequest,
    SourceRequest,
    Task,
    parts_by_name,
    roles_of,
    tasks_of,
    template_from,
    template_of,
    vocabulary_path,
)
from sftdist.data.template import ChatTemplate
from sftdist.data.workers import Workers

__all__ = ["PrepareRequest", "Prepared", "SourceRequest", "Survey", "prepare", "survey", "template_of"]

BAD_ROWS = "bad_rows.jsonl"


@dataclass(frozen=True)
class Prepared:
    """Open stores by source, those of the user's own validation and holdout files, the template, the report, the data
    manifest (`data.manifest`), and what keeps rows out of training that leak (`data.leaks`), where anything does."""

    stores: dict[str, TokenStore]
    held_out: dict[str, TokenStore]
    template: ChatTemplate
    report: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    overlay: Overlay | None = None


@dataclass(frozen=True)
class Survey:
    """What prepare would have to do: the sources without a store, and how many rows they have."""

    missing: tuple[str, ...]
    rows: int


def prepare(
    request: PrepareRequest, say: Callable[[str], None] = lambda line: None, tick: Callable[[str], None] | None = None
) -> Prepared:
    """Make or find every store, check them, and report. `tick` is told again and again how far it is; by default `say`
    is, now and then.

    `DataError` with all problems of all sources at once; its last line is the overrides that would go on.
    """
    roles = roles_of(request)
    parts = parts_by_name(roles)
    template = template_from(request, parts, say)
    tasks = tasks_of(request, roles, parts, template)
    tick = tick or at_most_every(SAY_EVERY_SECONDS, say)
    workers = Workers([task.job for task in tasks], request.workers)
    try:
        done = [have_store(request, task, number, workers, say, tick) for number, task in enumerate(tasks)]
    finally:
        workers.close()
    overlay = _overlay(request, [found.store for found in done], say)
    stores = [with_coverage(found.store if overlay is None else overlay.over(found.store)) for found in done]
    done = [replace(found, store=store) for found, store in zip(done, stores, strict=True)]
    watched = [
        _watched(request, entry, task, store) for (entry, _), task, store in zip(roles, tasks, stores, strict=True)
    ]
    shown = {one.store.name: one.shown for one in watched}
    leaks = () if overlay is None else refused_leaks(overlay, request.leaks, shown)
    problems = gather(request.store_dir / BAD_ROWS, watched, leaks)
    wrong = [*_unfit(request, stores), *_refusals(request, watched, problems)]
    holdout = _settle_holdout(request, stores, say) if not wrong else {}
    report = {
        **data_report(done, problems, template),
        "leaks": {} if overlay is None else leak_figures(overlay),
        "holdout": holdout,
        "required": _required(request),
    }
    if wrong:
        raise UnfitError("\n".join(wrong), report)
    by_name = {store.name: store for store in stores}
    provenance = {task.name: _provenance(entry, task) for (entry, _), task in zip(roles, tasks, strict=True)}
    train = {entry.source.name for entry in request.sources}
    return Prepared(
        stores={name: store for name, store in by_name.items() if name in train},
        held_out={name: store for name, store in by_name.items() if name not in train},
        template=template,
        report=report,
        manifest=data_manifest(stores, provenance, holdout),
        overlay=overlay,
    )


def _overlay(request: PrepareRequest, stores: Sequence[TokenStore], say: Callable[[str], None]) -> Overlay | None:
    """The stores are in the order of `roles_of`."""
    left = iter(stores)
    return overlay_of(
        request.store_dir,
        [next(left) for _ in request.sources],
        next(left) if request.validation else None,
        next(left) if request.holdout else None,
        near=request.near,
        policy=request.leaks,
        say=say,
    )


def survey(request: PrepareRequest, at_most: int) -> Survey:
    """Which stores are missing and how many raw rows they would take (counted up to `at_most`); tokenises nothing."""
    roles = roles_of(request)
    parts = parts_by_name(roles)
    trained = None if request.vocabulary is None else vocabulary_path(request, parts)
    if trained is not None and not trained.is_dir():
        missing = [entry.source.name for entry, _ in roles]
    else:
        tasks = tasks_of(request, roles, parts, template_from(request, parts, lambda line: None))
        missing = [task.name for task in tasks if not task.path.is_dir()]
    rows = 0
    for chunk in chain.from_iterable(chunks(parts[name]) for name in missing):
        rows += len(chunk.rows)
        if rows >= at_most:
            break
    return Survey(tuple(missing), min(rows, at_most))


# --- over all stores ----------------------------------------------------------------------------------


def _provenance(entry: SourceRequest, task: Task) -> Provenance:
    contract = task.job.checks.contract
    hashes = (None, None) if contract is None else (contract.sha256, contract.guideline_sha256)
    return Provenance(entry.licence, entry.origin, *hashes)


def _settle_holdout(
    request: PrepareRequest, stores: Sequence[TokenStore], say: Callable[[str], None]
) -> dict[str, Any]:
    """Hold what is held out to its lock where one is named; what the report and the manifest say of it."""
    by: dict[str, Any] = {"data.holdout": "a file"}
    if request.holdout is None:
        by = {"data.holdout_fraction": request.holdout_fraction}
    rules = [name for name, on in asdict(request.rules).items() if on]
    made_with = {"split_version": SPLIT_VERSION, **by, "data.normalise": ", ".join(rules)}
    folders = {store.name: store.path for store in stores}
    data = Data([rows_of(store) for store in stores], made_with, lambda source: left_at(folders[source]))
    lock = None if request.holdout_lock is None else settle(request.holdout_lock, request.lock, data, say)
    return {"rows": data.count(), "locked": lock is not None, "version": None if lock is None else lock.version}


# --- what is wrong ------------------------------------------------------------------------------------


def _watched(request: PrepareRequest, entry: SourceRequest, task: Task, store: TokenStore) -> Watched:
    name = entry.source.name
    bans = [
        (BREACH, entry.on_breach, Ban(f"{name}: {BREACH}", "against the contract", f"data.sources.{name}.on_breach")),
        (CUT_OFF, request.cut_off, Ban(CUT_OFF, "with an answer that is cut off or empty", "data.cut_off")),
        (
            CONTRADICTION,
            request.contradictions,
            Ban(CONTRADICTION, "with another answer to the same prompt", "data.contradictions"),
        ),
    ]
    shown = {part.name: part.shown for part in task.job.parts}
    return Watched(store, shown, {kind: ban for kind, policy, ban in bans if policy is OnFinding.error})


def _refusals(request: PrepareRequest, watched: Sequence[Watched], problems: Problems) -> list[str]:
    limits = limits_of(watched, max_bad_rows=request.max_bad_rows, max_refused=request.max_refused)
    refusal = problems.refusal([*limits, BAN], request.store_dir / BAD_ROWS)
    return [] if refusal is None else [refusal]


def _unfit(request: PrepareRequest, stores: Sequence[TokenStore]) -> list[str]:
    """What is wrong with stores as wholes, and what there is too little of in all of them together."""
    found = [problem for store in stores if (problem := unsound(store)) is not None]
    required = _required(request)
    return [*found, *too_few([store.manifest["coverage"] for store in stores], required)]


def _required(request: PrepareRequest) -> dict[str, dict[str, int]]:
    return {"tags": dict(request.require_tags), "origins": dict(request.require_origins)}
