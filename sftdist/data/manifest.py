"""The data manifest: what a set of stores was made of, in one file that can be kept, and compared with another one.

It names its stores and holds their figures, no rows; what is compared row by row are the digests in the stores
themselves, as long as they are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sftdist.core.errors import DataError
from sftdist.core.storage import read_json, read_jsonl
from sftdist.data.build import DROPPED
from sftdist.data.leaks import Overlay
from sftdist.data.rowset import RowSet
from sftdist.data.store import SPLITS, TokenStore
from sftdist.data.versions import SCHEMA_VERSION

MANIFEST_FORMAT = 1
MANIFEST = "data-manifest.json"


@dataclass(frozen=True)
class Provenance:
    """What the config says of a source and no row does; `contract` and `guideline` are SHA-256 of what they say."""

    licence: str | None = None
    origin: str | None = None
    contract: str | None = None
    guideline: str | None = None


def data_manifest(
    stores: Iterable[TokenStore], provenance: Mapping[str, Provenance], holdout: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the stores were made of, and their figures; the same for the same data, wherever it lies.

    `holdout`: how many conversations are held out, and the version of the lock that they were held to.
    """
    return {
        "format": MANIFEST_FORMAT,
        "schema_version": SCHEMA_VERSION,
        "holdout": dict(holdout),
        "sources": {store.name: _source(store, provenance.get(store.name, Provenance())) for store in stores},
    }


def _source(store: TokenStore, provenance: Provenance) -> dict[str, Any]:
    return {
        "store": store.path.name,
        "overlay": store.manifest.get("overlay"),
        "key": store.manifest["key"],
        **asdict(provenance),
        "splits": splits_of(store),
        "stages": store.manifest["counts"],
        "coverage": store.manifest.get("coverage", {}),
        "made_of": store.manifest["ingredients"],
    }


def splits_of(store: TokenStore) -> dict[str, dict[str, Any]]:
    """Rows, tokens and supervised weight of each split, as training sees them."""
    found = {}
    for number, name in enumerate(SPLITS):
        here = store.split == number
        found[name] = {
            "rows": int(here.sum()),
            "tokens": int(store.lengths[here].sum(dtype=np.int64)),
            "targets": float(store.targets[here].sum()),
        }
    return found


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises DataError where the file is absent, is no data manifest, or is one of a newer format."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as problem:
        required = f"a {MANIFEST} that prepare wrote"
        raise DataError(f"diff={path}: given a file that cannot be read ({problem}), required {required}") from None
    written = found.get("format") if isinstance(found, dict) else None
    if isinstance(written, int) and written > MANIFEST_FORMAT:
        required = f"format {MANIFEST_FORMAT} or earlier; use a newer sftdist"
        raise DataError(f"diff={path}: given a manifest of format {written}, required {required}")
    sources = found.get("sources") if written == MANIFEST_FORMAT else None
    if not isinstance(sources, dict) or not all(_is_source(entry) for entry in sources.values()):
        raise DataError(f"diff={path}: given a file that is no data manifest, required a {MANIFEST}")
    return dict(found)


def _is_source(entry: object) -> bool:
    if not isinstance(entry, dict) or not {"store", "splits", "made_of", *vars(Provenance())} <= set(entry):
        return False
    splits, counts = entry["splits"], ("rows", "tokens", "targets")
    return all(isinstance(splits.get(name), dict) and set(counts) <= set(splits[name]) for name in SPLITS)


# --- the rows behind a manifest -----------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of the sources of a manifest whose stores were found; `gone`: why not, for each of the others."""

    found: dict[str, RowSet] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)


def rows_of(store: TokenStore) -> RowSet:
    return RowSet(store.name, store.contents, store.prompts, store.split, store.row_ids)


def rows_behind(manifest: Mapping[str, Any], folders: Sequence[Path]) -> Rows:
    """Open the stores of a manifest: their names hold the key of their content, so wherever one is, it is the same."""
    rows = Rows()
    for name, entry in manifest["sources"].items():
        try:
            rows.found[name] = rows_of(open_source(entry, folders))
        except DataError as problem:  # gone, or of an earlier format
            rows.gone[name] = str(problem)
    return rows


def open_source(entry: Mapping[str, Any], folders: Sequence[Path]) -> TokenStore:
    """The store of a source of a manifest, as it was trained on: without the rows that leaked. Raises DataError where
    it is in none of the folders."""
    store = TokenStore.open(_there(entry["store"], folders, "store"))
    overlay = entry.get("overlay")
    return store if overlay is None else Overlay(_there(overlay, folders, "list of leaks")).over(store)


def _there(name: str, folders: Sequence[Path], what: str) -> Path:
    for folder in folders:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"its {what} {name} is not in {' or '.join(map(str, dict.fromkeys(folders)))}")


def left_at(store: Path) -> dict[str, str]:
    """At which stage each row left that was read and is not in the store, by id."""
    return {row["id"]: row["stage"] for row in read_jsonl(store / DROPPED)}
