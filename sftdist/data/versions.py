"""The versions of the row schema: which one a row has, and how a row of an older one becomes one of today.

A version says how the fields beside the text are to be read; the four row shapes are the same in all of them.

1. The provenance of the answers is `origin`: `human`, or the name of the model that wrote them. `tags` may be one text
   with commas (`"billing, refund"`), as spreadsheets write lists.
2. `origin` has become `label_origin`: `human` or `synthetic:MODEL`, nothing else, so that the two can be counted apart.
   `tags` is a list of words. A key `origin` means nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sftdist.data.rowerror import fail, show

SCHEMA_VERSION = 2
HUMAN = "human"
SYNTHETIC = "synthetic:"

Row = Mapping[str, Any]


def of_today(row: Row, default: int | None) -> Row:
    """The row as one of `SCHEMA_VERSION`. Its own `schema_version` wins over `default`; without both it is the newest.

    Raises RowError where the version is unknown, or where a field cannot be what its version says it is.
    """
    version = _version_of(row, SCHEMA_VERSION if default is None else default)
    for older in range(version, SCHEMA_VERSION):
        row = MIGRATIONS[older](row)
    return row


def is_known(version: object) -> bool:
    """Whether rows of this version can be read."""
    return isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= SCHEMA_VERSION


def _version_of(row: Row, default: int) -> int:
    version = row.get("schema_version")
    if version is None:
        return default
    if is_known(version):
        return int(version)
    required = f"a whole number from 1 to {SCHEMA_VERSION}"
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        required += "; newer rows need a newer sftdist"
    fail("schema_version", show(version), required, "unknown schema version")


# --- the steps ----------------------------------------------------------------------------------------


def _from_1(row: Row) -> Row:
    changed = {key: value for key, value in row.items() if key != "origin"}
    origin = row.get("origin")
    if origin is not None and origin != "":
        if row.get("label_origin") is not None:
            required = "origin alone (schema_version 1) or label_origin alone (2)"
            fail("label_origin", "it beside origin", required, "two label origins")
        changed["label_origin"] = _label_origin_from_1(origin)
    if isinstance(row.get("tags"), str):
        changed["tags"] = [tag for tag in map(str.strip, row["tags"].split(",")) if tag]
    return changed


def _label_origin_from_1(origin: object) -> str:
    name = origin.strip() if isinstance(origin, str) else ""
    if not name:
        fail("origin", show(origin), f"{HUMAN}, or the name of a model", "label origin is not text")
    return name if name == HUMAN or name.startswith(SYNTHETIC) else SYNTHETIC + name


MIGRATIONS: dict[int, Callable[[Row], Row]] = {1: _from_1}
