"""Where rows are, in our words: a file, a folder or a set of the Hub, and the name of the source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sftdist.commands.migrate_peers.account import Account, Kind
from sftdist.core.rules import BROUGHT_ALONG

READABLE = (".jsonl", ".json", ".ndjson", ".parquet")
_FILES = (*READABLE, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REMOTE = re.compile(r"[a-z0-9]+://")
# Sides of a conversation under these names are read as they are: our key for the shape of a row.
NAMES_OF = {("role", "content"): "messages", ("from", "value"): "sharegpt"}
LISTS = ("messages", "conversations", "conversation")
ROW_FUNCTION = "data.sources.{name}.row_function=package.module:function turns such a row into messages"


def is_local(path: str, folder: Path) -> bool:
    """Whether a path means files of this machine: it is there, or looks like one."""
    if (folder / path).expanduser().exists() or path.startswith((".", "/", "~")) or "*" in path:
        return True
    return PurePosixPath(path).suffix in _FILES or not _HUB.fullmatch(path)


def our_path(account: Account, key: str, path: str) -> str | None:
    """A path as `data.sources.NAME.path` takes it; what it cannot be read from is noted under `key`."""
    if _REMOTE.match(path):
        account.left(key, f"given {path}; nothing is fetched from there")
        account.need(f"{key}: bring {path} to this machine and give its file as the path of the source")
        return None
    if not is_local(path, account.folder):
        return f"hub:{path}"
    suffix = PurePosixPath(path).suffix
    if suffix in _FILES and suffix not in READABLE:
        account.left(key, f"given {path}; files are JSON lines, JSON or parquet here")
        account.need(f"{key}: write {path} as JSON lines, one conversation per line")
        return None
    return path


def name_of(path: str, taken: Mapping[str, Any]) -> str:
    """A name for the source: the file's or the set's, and a number where that is taken."""
    stem = PurePosixPath(path.removeprefix("hub:").rstrip("/")).name
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem.partition(".")[0].replace("*", "")).strip("_-") or "train"
    stem = f"{stem}_rows" if stem in BROUGHT_ALONG else stem
    names = [stem, *(f"{stem}_{number}" for number in range(2, 1000))]
    return next(name for name in names if name not in taken)


def add(account: Account, values: Mapping[str, Any], origin: str) -> str:
    """One more source with these keys of ours; its name."""
    found = account.values.setdefault("data.sources", {})
    name = name_of(str(values["path"]), found)
    found[name] = dict(values)
    account.origins["data.sources"] = origin
    return name


def hub_keys(account: Account, path: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """Split, configuration and revision of a set of the Hub; `keys`: theirs to ours. A file has none of them."""
    found: dict[str, Any] = {}
    for key, ours in keys.items():
        if not account.has(key):
            continue
        value = str(account.get(key))
        if not path.startswith("hub:"):
            account.unneeded(key, "a file has no splits, configurations or revisions")
        elif ours == "hub_split" and not re.fullmatch(r"\w+", value):
            found[ours] = re.split(r"[\[+]", value)[0]
            account.left(key, f"given {value}, a part of a split; all of {found[ours]} is taken")
        else:
            found[ours] = value
            account.note(Kind.carried, key, f"{ours}={value}")
    return found
