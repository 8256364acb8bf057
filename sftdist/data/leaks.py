"""Rows that may not be trained on because of what other rows hold out, in whatever source those are.

A store knows nothing of other stores, so this is laid over them: `leaks-<key>/` holds the row numbers of each source,
what they leak and the figures. The same stores find it again and compute nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.settings import Leaks
from sftdist.core.storage import (
    publish_directory,
    read_json,
    read_jsonl,
    remove_path,
    sha256_file,
    sha256_json,
    verify_directory,
    write_json,
)
from sftdist.data.near import NEAR_VERSION, Near, near_of
from sftdist.data.problems import Ban
from sftdist.data.rowset import as_keys
from sftdist.data.store import HOLDOUT, LEAKED, SPLITS, TRAIN, VALIDATION, TokenStore

LEAKS_VERSION = 1
LEAK = "leak"
DROPPED, FIGURES = "dropped.jsonl", "leaks.json"
KEY_DIGITS = 16
EXAMPLES = 10
EXACT, NEAR_PROMPT, NEAR_TEXT = "the same prompt", "nearly the same prompt", "nearly the same text"
BAN = Ban(LEAK, "in or near the rows that are held out", "data.leaks", instead="drop")

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Rows that are held out, of several stores one after the other: `of` int64 [m, 2] are store and row."""

    stores: tuple[TokenStore, ...]
    of: NDArray[np.int64]

    @classmethod
    def among(cls, stores: Sequence[TokenStore], splits: Sequence[int]) -> HeldOut:
        places = [np.flatnonzero(np.isin(store.split, splits)) for store in stores]
        pairs = [np.stack([np.full(len(rows), i), rows], axis=1) for i, rows in enumerate(places)]
        return cls(tuple(stores), np.concatenate([np.empty((0, 2), np.int64), *pairs]))

    def column(self, name: str) -> NDArray[Any]:
        """`prompts` or `signatures` of all of them."""
        each = [vars(store)[name][self.of[self.of[:, 0] == i, 1]] for i, store in enumerate(self.stores)]
        return np.concatenate(each)


@dataclass(frozen=True)
class Leak:
    """A row of a store, and the row of another (or the same) one that it leaks; `own`: that is of the user's file."""

    store: TokenStore
    row: int
    reason: str
    held_out: TokenStore
    twin: int
    own: bool


@dataclass(frozen=True)
class Overlay:
    """The published leaks of some stores."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name.rpartition("-")[2]

    @property
    def figures(self) -> dict[str, Any]:
        """Counts of rows: "rows" by source, "reasons", "of your own data.holdout", "also in another source"."""
        return dict(read_json(self.path / FIGURES))

    def over(self, store: TokenStore) -> TokenStore:
        """The store with the rows that leak in split `LEAKED`, and its figures without them; a store with such rows
        also has another `key` in its manifest, for another data is trained on."""
        file = self.path / f"{store.name}.npy"
        rows: Rows = np.load(file) if file.is_file() else np.empty(0, np.int64)
        return _without(store, rows, sha256_file(file), self.path.name) if len(rows) else store

    def dropped(self) -> Iterator[dict[str, Any]]:
        """{"source", "id", "file", "line", "stage", "reason", "twin_source", "twin", "own"} of each row."""
        return read_jsonl(self.path / DROPPED)


def overlay_of(
    folder: Path,
    sources: Sequence[TokenStore],
    validation: TokenStore | None,
    holdout: TokenStore | None,
    *,
    near: Near | None,
    policy: Leaks | None,
    say: Callable[[str], None] = lambda line: None,
) -> Overlay | None:
    """Find the overlay of these stores in `folder`, or make it; None where nothing is held out.

    With `Leaks.off` only the exact prompts of the user's own files are kept out, as they always are.
    """
    stores = [store for store in (*sources, validation, holdout) if store is not None]
    files_only = policy is Leaks.off
    if not any(np.any(store.split != TRAIN) for store in ((validation, holdout) if files_only else stores) if store):
        return None
    near = None if files_only else near
    ingredients = {
        "version": [LEAKS_VERSION, NEAR_VERSION],
        "sources": [[store.name, store.manifest["key"]] for store in sources],
        "validation": None if validation is None else validation.manifest["key"],
        "holdout": None if holdout is None else holdout.manifest["key"],
        "near": None if near is None else asdict(near),
        "files only": files_only,
    }
    path = folder / f"leaks-{sha256_json(ingredients)[:KEY_DIGITS]}"
    if path.is_dir() and verify_directory(path):
        with suppress(FileNotFoundError):  # another process has found it, too
            remove_path(path)
    if not path.is_dir():
        say("comparing the train rows with those that are held out")
        found = list(find_leaks(sources, validation, holdout, near=near, files_only=files_only))
        with publish_directory(path) as temporary:
            _write(temporary, found, sources)
    return Overlay(path)


def find_leaks(
    sources: Sequence[TokenStore],
    validation: TokenStore | None,
    holdout: TokenStore | None,
    *,
    near: Near | None,
    files_only: bool = False,
) -> Iterator[Leak]:
    """Train rows whose prompt is held out by any store, or that are near a held-out row (prompt or whole text).

    And validation rows with a prompt of the user's own holdout file; no other held-out row ever leaves.
    """
    own = HeldOut.among([] if holdout is None else [holdout], [HOLDOUT])
    files = [] if validation is None else [validation]
    others = HeldOut.among(files if files_only else [*sources, *files], [VALIDATION, HOLDOUT])
    for store in (*sources, *files):
        left = np.flatnonzero(store.split == VALIDATION)
        yield from _leaks(store, left, own, _same_prompt(store, left, own), EXACT, own=True)
    for store in sources:
        left = np.flatnonzero(store.split == TRAIN)
        for held_out, is_own in ((own, True), (others, False)):
            for twin, reason in _twins(store, left, held_out, near):
                yield from _leaks(store, left, held_out, twin, reason, own=is_own)
                left = left[twin < 0]


def _twins(store: TokenStore, rows: Rows, held_out: HeldOut, near: Near | None) -> Iterator[tuple[Rows, str]]:
    """For the rows that are left after each step the held-out one that it leaks, or -1."""
    if not len(held_out.of):
        return
    twin = _same_prompt(store, rows, held_out)
    yield twin, EXACT
    rows = rows[twin < 0]
    if near is None:
        return
    assert store.signatures is not None, "stores that are compared have signatures"
    signatures = held_out.column("signatures")
    for column, like, reason in ((1, near.of_prompts, NEAR_PROMPT), (0, near, NEAR_TEXT)):
        twin = near_of(store.signatures[:, column], signatures[:, column], like, rows=rows)[rows]
        yield twin, reason
        rows = rows[twin < 0]


def _same_prompt(store: TokenStore, rows: Rows, held_out: HeldOut) -> Rows:
    if not len(held_out.of):
        return np.full(len(rows), -1)
    known, first = np.unique(as_keys(held_out.column("prompts")), return_index=True)
    wanted = as_keys(store.prompts[rows])
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, first[at], -1)


def _leaks(store: TokenStore, rows: Rows, held_out: HeldOut, twin: Rows, reason: str, *, own: bool) -> Iterator[Leak]:
    for place in np.flatnonzero(twin >= 0).tolist():
        number, row = held_out.of[twin[place]].tolist()
        yield Leak(store, int(rows[place]), reason, held_out.stores[number], row, own)


# --- on disk --------------------------------------------------------------------------------------------


def _write(folder: Path, found: Sequence[Leak], sources: Sequence[TokenStore]) -> None:
    by_store: dict[str, list[int]] = {}
    with (folder / DROPPED).open("w", encoding="utf-8") as file:
        for leak in found:
            by_store.setdefault(leak.store.name, []).append(leak.row)
            file.write(json.dumps(_line(leak), ensure_ascii=False) + "\n")
    for name, rows in by_store.items():
        np.save(folder / f"{name}.npy", np.sort(np.array(rows, dtype=np.int64)))
    figures = {
        "rows": {name: len(rows) for name, rows in by_store.items()},
        "reasons": Counter(leak.reason for leak in found),
        "of your own data.holdout": sum(leak.own for leak in found),
        "also in another source": dict(_in_other_sources(sources)),
    }
    write_json(folder / FIGURES, figures)


def _line(leak: Leak) -> dict[str, Any]:
    file, line = leak.store.origin(leak.row)
    return {
        "source": leak.store.name,
        "id": leak.store.row_ids([leak.row])[0],
        "file": file,
        "line": line,
        "stage": "leaked",
        "split": SPLITS[int(leak.store.split[leak.row])],
        "reason": leak.reason,
        "twin_source": leak.held_out.name,
        "twin": leak.held_out.row_ids([leak.twin])[0],
        "own": leak.own,
    }


def _in_other_sources(sources: Sequence[TokenStore]) -> Iterator[tuple[str, int]]:
    """How many train rows of each source are exactly in an earlier one, too: they stay, for who weighs a source twice
    may want that."""
    before = np.empty(0, dtype="S16")
    for store in sources:
        own = np.unique(as_keys(store.contents[store.split == TRAIN]))
        if count := int(np.isin(own, before).sum()):
            yield store.name, count
        before = np.union1d(before, own)


def _without(store: TokenStore, rows: Rows, digest: str, overlay: str) -> TokenStore:
    split = store.split.copy()
    counts = {"rows": len(rows), "tokens": int(store.lengths[rows].sum(dtype=np.int64))}
    leaked: dict[str, Any] = {**counts, "targets": float(store.targets[rows].sum())}
    splits = {name: dict(figures) for name, figures in store.manifest["splits"].items()}
    for number, name in enumerate(SPLITS):
        of = rows[split[rows] == number]
        splits[name]["rows"] -= len(of)
        splits[name]["tokens"] -= int(store.lengths[of].sum(dtype=np.int64))
        splits[name]["targets"] -= float(store.targets[of].sum())
    split[rows] = LEAKED
    manifest = {
        **store.manifest,
        "key": sha256_json([store.manifest["key"], digest])[:KEY_DIGITS],
        "overlay": overlay,
        "splits": splits,
        "counts": {**store.manifest["counts"], "leaked": leaked},
    }
    return replace(store, split=split, manifest=manifest)


# --- what is said ---------------------------------------------------------------------------------------


def refused_leaks(
    overlay: Overlay, policy: Leaks | None, shown: Mapping[str, Mapping[str, str]]
) -> Iterator[dict[str, Any]]:
    """The train rows that may not be left out silently, as problems: all with `Leaks.error`; by default those that leak
    the user's own holdout file. `shown`: by source, how its files are called in messages."""
    for row in overlay.dropped():
        if row["split"] == SPLITS[TRAIN] and (policy is Leaks.error or (policy is None and row["own"])):
            yield {
                "kind": LEAK,
                "source": row["source"],
                "file": shown[row["source"]][row["file"]],
                "line": row["line"],
                "id": row["id"],
                "reason": f"{row['reason']} as a held-out row",
                "message": f"{row['reason']} as {row['twin_source']} {row['twin']}",
            }


def leak_figures(overlay: Overlay) -> dict[str, Any]:
    """What the report says: counts, and some rows with what they leak."""
    examples = [row for row, _ in zip(overlay.dropped(), range(EXAMPLES), strict=False)]
    keys = ("source", "id", "reason", "twin_source", "twin")
    return {
        **{name: value for name, value in overlay.figures.items() if value},
        "examples": [{key: row[key] for key in keys} for row in examples],
        "listed in": str(overlay.path / DROPPED),
    }
