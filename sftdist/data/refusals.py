"""Why prepare ends with exit 3: everything that is wrong with all stores, in one message and one file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from sftdist.core.errors import DataError
from sftdist.core.storage import read_jsonl
from sftdist.data.build import FINDINGS, REJECTS
from sftdist.data.problems import BAD, REFUSED, Ban, Limit, Problems, write_problems
from sftdist.data.store import TRAIN, TokenStore

Row = Mapping[str, Any]


class UnfitError(DataError):
    """The stores are made, and what is in them may not be trained on; `report` is the data report all the same."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Watched:
    """A store, how its files are shown, and what may not be found in it: the ban by the kind of the finding."""

    store: TokenStore
    shown: Mapping[str, str]
    bans: Mapping[str, Ban] = field(default_factory=dict)


def gather(path: Path, watched: Sequence[Watched], leaks: Iterable[Row] = ()) -> Problems:
    """All rows that are left out or banned, in the file `path` and in groups."""
    problems = Problems()
    write_problems(path, chain((row for one in watched for row in _rows(one)), leaks), problems.add)
    return problems


def _rows(one: Watched) -> Iterator[Row]:
    for row in read_jsonl(one.store.path / REJECTS):
        yield {**row, "file": one.shown[row["file"]]}
    if one.bans:
        for row in read_jsonl(one.store.path / FINDINGS):
            if row["kind"] in one.bans:
                yield {**row, "kind": one.bans[row["kind"]].kind, "file": one.shown[row["file"]]}


def limits_of(watched: Sequence[Watched], *, max_bad_rows: int, max_refused: int) -> list[Limit]:
    bans = {ban.kind: ban for one in watched for ban in one.bans.values()}
    return [
        Limit(BAD, "cannot be parsed", "data.max_bad_rows", max_bad_rows),
        Limit(REFUSED, "without a provable mask", "data.max_refused", max_refused),
        *bans.values(),
    ]


def unsound(store: TokenStore) -> str | None:
    """What is wrong with a store as a whole."""
    if not len(store):
        given = f"{store.name}: given no conversation that can be trained on"
        return f"{given} ({store.manifest['counts']['read']['rows']} rows read), required at least one"
    if store.manifest["stop_share"] < 1.0:
        given = f"{store.name}: given {store.manifest['stop_share']:.1%} of the rows end with a stop token"
        return f"{given}, required all; use a chat template whose end-of-turn marker is one special token"
    return None


# --- how many of what -----------------------------------------------------------------------------------


def with_coverage(store: TokenStore) -> TokenStore:
    """The store with `coverage` in its manifest: how many train rows have each tag and each label origin,
    {"tags": {tag: rows}, "origins": {origin: rows}}."""
    found: dict[str, dict[str, int]] = {"tags": {}, "origins": {}}
    for (tags, origin), rows in store.labels_of(store.split == TRAIN).items():
        for tag in tags:
            found["tags"][tag] = found["tags"].get(tag, 0) + rows
        if origin is not None:
            found["origins"][origin] = found["origins"].get(origin, 0) + rows
    coverage = {kind: dict(sorted(counts.items())) for kind, counts in found.items()}
    return replace(store, manifest={**store.manifest, "coverage": coverage})


def too_few(
    coverages: Sequence[Mapping[str, Mapping[str, int]]], required: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """The tags and origins of which all sources together have fewer train rows than `required` of their kind."""
    found = []
    for kind, least in required.items():
        for name, rows in least.items():
            given = sum(coverage[kind].get(name, 0) for coverage in coverages)
            if given < rows:
                found.append(f"data.require.{kind}.{name}: given {given:,} train rows, required at least {rows:,}")
    return found
