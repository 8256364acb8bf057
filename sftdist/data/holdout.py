"""The locked holdout: a file, committed beside the config, that says which conversations are held out.

It holds ids and digests and none of the text. What is held out is compared by the digest of its content, so the order
of the rows, their files and their sources do not matter, and neither does what is added to the train rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import DataError
from sftdist.core.storage import write_text
from sftdist.data.rowset import RowSet, as_keys, first_places, is_place, split_name
from sftdist.data.store import HOLDOUT, SPLITS

LOCK_FORMAT = 1
EXAMPLES = 5
_DIGEST = re.compile(r"[0-9a-f]{32}")


class Held(NamedTuple):
    """One conversation that is held out: digests in hex (`data.keys`), and the id that it had when it was locked."""

    prompt: str
    content: str
    id: str


@dataclass(frozen=True)
class Lock:
    """A lock file. `made_with`: the settings that decide what is held out; `history`: a line of counts a version."""

    version: int
    made_with: dict[str, Any]
    history: list[dict[str, Any]]
    rows: dict[str, list[Held]]

    def __len__(self) -> int:
        return len({row.content for rows in self.rows.values() for row in rows})


@dataclass(frozen=True)
class Changes:
    """How the data differs from its lock, as `source id` of rows: `moved` ones are there still, in another split.

    `changed`: the same id, or the same prompt, and another text. `added` has none of the changed ones.
    """

    added: list[str]
    removed: list[str]
    changed: list[str]
    moved: list[str]

    def __bool__(self) -> bool:
        return any((self.added, self.removed, self.changed, self.moved))


@dataclass(frozen=True)
class Data:
    """What prepare has found: all rows of all sources, and what decides which of them are held out. `left_at` tells at
    which stage rows of a source have left, by id."""

    rows: Sequence[RowSet]
    made_with: dict[str, Any]
    left_at: Callable[[str], Mapping[str, str]] = lambda source: {}

    def held_out(self) -> dict[str, list[Held]]:
        """The conversations of the holdout by source, each once, in the order of their digests."""
        found = {}
        for rows in self.rows:
            at = np.flatnonzero(rows.split == HOLDOUT)
            at = at[first_places(rows.contents[at])]
            if len(at):
                columns = (_hex(rows.prompts[at]), _hex(rows.contents[at]), rows.ids(at))
                found[rows.source] = sorted(map(Held, *columns), key=lambda row: row.content)
        return found

    def count(self) -> int:
        """How many conversations are held out."""
        keys = [as_keys(rows.contents[rows.split == HOLDOUT]) for rows in self.rows]
        return len(np.unique(np.concatenate(keys)))


def settle(path: Path, action: str | None, data: Data, say: Callable[[str], None]) -> Lock:
    """Hold the data to its lock, or do with the lock what `action` asks for: `write`, `extend` or `withdraw`.

    Raises DataError that counts what differs, names a few rows of each kind and says what to do.
    """
    return _ACTIONS[action](path, data, say)


def _check(path: Path, data: Data, say: Callable[[str], None]) -> Lock:
    lock = read_lock(path)
    changes = compare(lock, data)
    if changes:
        _refuse(path, lock, data, changes)
    return lock


def _write(path: Path, data: Data, say: Callable[[str], None]) -> Lock:
    """The first version; where there is a lock already, it must be of the same rows."""
    if path.exists():
        lock = read_lock(path)
        if changes := compare(lock, data):
            _refuse(path, lock, data, changes)
        say(f"{path}: the holdout is locked already (version {lock.version}, {_rows(len(lock))})")
        return lock
    rows = data.held_out()
    if not rows:
        required = "at least one to lock; raise data.holdout_fraction, or give data.holdout=FILE"
        raise DataError(f"lock=write: given no row that is held out, required {required}")
    lock = _publish(path, Lock(1, data.made_with, [], rows))
    say(f"{path}: the holdout is locked, {_rows(len(lock))}; commit this file beside the config")
    return lock


def _extend(path: Path, data: Data, say: Callable[[str], None]) -> Lock:
    """A version with all rows of the one before and those that are new."""
    lock = read_lock(path)
    changes = compare(lock, data)
    if changes.removed or changes.changed or changes.moved:
        _refuse(path, lock, data, changes)
    if not changes:
        say(f"{path}: nothing to add to version {lock.version}, {_rows(len(lock))}")
        return lock
    kept = path.with_name(f"{path.stem}.v{lock.version}{path.suffix}")
    write_text(kept, path.read_text(encoding="utf-8"))
    new = Lock(lock.version + 1, data.made_with, lock.history, data.held_out())
    new = _publish(path, new, added=len(changes.added))
    say(
        f"{path}: version {new.version} holds {_rows(len(new))}, {len(changes.added)} of them new; version "
        f"{lock.version} is kept in {kept}. A model that was trained before may have seen the new ones."
    )
    return new


def _withdraw(path: Path, data: Data, say: Callable[[str], None]) -> Lock:
    """A version without the rows that are not in the data any more; what is there is never given up, nothing is added.

    The version before is not kept: rows that had to be deleted leave with their ids and digests.
    """
    lock = read_lock(path)
    changes = compare(lock, data)
    if changes.moved:
        _refuse(path, lock, data, changes)
    gone = [*changes.removed, *changes.changed]
    if not gone:
        say(f"{path}: all rows of version {lock.version} are in the data, nothing to withdraw")
        return lock
    there = {row.content for rows in data.held_out().values() for row in rows}
    left = {source: [row for row in rows if row.content in there] for source, rows in lock.rows.items()}
    new = Lock(lock.version + 1, lock.made_with, lock.history, {source: rows for source, rows in left.items() if rows})
    new = _publish(path, new, withdrawn=len(gone))
    say(f"{path}: version {new.version} holds {_rows(len(new))}; {_rows(len(gone))} withdrawn: {_some(gone)}")
    older = sorted(path.parent.glob(f"{path.stem}.v*{path.suffix}"))
    files = f"{', '.join(map(str, older))} and in " if older else ""
    say(f"Their ids and digests still stand in {files}the history of the repository, where it was committed.")
    return new


_ACTIONS: dict[str | None, Callable[[Path, Data, Callable[[str], None]], Lock]] = {
    None: _check,
    "write": _write,
    "extend": _extend,
    "withdraw": _withdraw,
}


# --- comparing ----------------------------------------------------------------------------------------

Entry = tuple[str, Held]  # with its source


def compare(lock: Lock, data: Data) -> Changes:
    """What is held out now against what is locked, by content; copies of a conversation are one."""
    held, locked = _by_content(data.held_out()), _by_content(lock.rows)
    new = [entry for content, entry in held.items() if content not in locked]
    gone = [entry for content, entry in locked.items() if content not in held]
    if not gone:
        return Changes(_names(new), [], [], [])
    now_in = _splits_of(data, gone)
    places = _places_of_ids(data, gone)
    prompts = {row.prompt for _, row in new}
    left = {source: data.left_at(source) for source in {source for source, _ in gone} & {r.source for r in data.rows}}
    found = Changes([], [], [], [])
    rewritten: list[Entry] = []
    for source, row in gone:
        name, at = f"{source} {row.id}", places.get((source, row.id))
        if row.content in now_in:
            found.moved.append(f"{name} (now in {now_in[row.content]})")
        elif at is not None or row.prompt in prompts:
            found.changed.append(name if at in (None, SPLITS[HOLDOUT]) else f"{name} (now in {at})")
            rewritten.append((source, row))
        else:
            stage = left.get(source, {}).get(row.id)
            found.removed.append(name if stage is None else f"{name} (left: {stage})")
    told = {row.prompt for _, row in rewritten} | {(source, row.id) for source, row in rewritten}
    found.added.extend(_names((source, row) for source, row in new if not told & {row.prompt, (source, row.id)}))
    return found


def _splits_of(data: Data, gone: Iterable[Entry]) -> dict[str, str]:
    """Where rows are that were held out, and are in the data still: the name of the split by content."""
    wanted = np.array([bytes.fromhex(row.content) for _, row in gone], dtype="S16")
    found = {}
    for rows in data.rows:
        for place in np.flatnonzero(np.isin(as_keys(rows.contents), wanted)):
            found[rows.contents[place].tobytes().hex()] = split_name(int(rows.split[place]))
    return found


def _places_of_ids(data: Data, gone: Iterable[Entry]) -> dict[tuple[str, str], str]:
    """The split of the rows that have these ids now. An id that is a place (`file:line`) tells nothing: other rows move
    there when one is taken out."""
    wanted = {(source, row.id) for source, row in gone if not is_place(row.id)}
    found = {}
    for rows in data.rows:
        if any(source == rows.source for source, _ in wanted):
            for name, split in zip(rows.all_ids(), rows.split.tolist(), strict=True):
                if (rows.source, name) in wanted:
                    found[rows.source, name] = split_name(split)
    return found


def _by_content(rows: Mapping[str, Iterable[Held]]) -> dict[str, Entry]:
    return {row.content: (source, row) for source, held in rows.items() for row in held}


def _names(entries: Iterable[Entry]) -> list[str]:
    return [f"{source} {row.id}" for source, row in entries]


def _hex(digests: NDArray[np.uint8]) -> list[str]:
    return [row.tobytes().hex() for row in digests]


# --- words --------------------------------------------------------------------------------------------

_KINDS = {
    "added": "held out, but not in the lock",
    "removed": "in the lock, but not in the data",
    "changed": "in the lock with another text",
    "moved": "in the lock and in the data, but not held out",
}


def _refuse(path: Path, lock: Lock, data: Data, changes: Changes) -> NoReturn:
    lines = [f"data.holdout_lock={path}: given a holdout that is not the locked one (version {lock.version}):"]
    for kind, meaning in _KINDS.items():
        names = vars(changes)[kind]
        lines += [f"  {kind}: {_rows(len(names))} {meaning}: {_some(names)}"] if names else []
    for key in sorted({*lock.made_with, *data.made_with}):
        before, now = (made_with.get(key, "not set") for made_with in (lock.made_with, data.made_with))
        lines += [f"  {key} was {before} when it was locked, now {now}"] if before != now else []
    lines.append("required the same rows: bring the earlier data and settings back; or, where the change is meant:")
    if changes.removed or changes.changed:
        lines.append("  lock=withdraw gives up the rows that are gone or have another text, for good")
    if changes.added or changes.changed:
        first = "then " if changes.removed or changes.changed else ""
        lines.append(f"  {first}lock=extend takes in the rows that are new")
    if changes.moved:
        lines.append("  what is in the data stays held out; only a lock of another name (lock=write) begins anew")
    raise DataError("\n".join(lines))


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


def _some(names: Sequence[str]) -> str:
    more = len(names) - EXAMPLES
    return ", ".join(names[:EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")


# --- the file -----------------------------------------------------------------------------------------


def read_lock(path: Path) -> Lock:
    """Raises DataError where the file is absent, is no lock, or is one of a newer format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        required = "the committed lock; lock=write makes the first one"
        raise DataError(f"data.holdout_lock: given {path}, which does not exist, required {required}") from None
    except (OSError, ValueError) as problem:
        raise _no_lock(path, str(problem)) from None
    written = found.get("format") if isinstance(found, dict) else None
    if isinstance(written, int) and written > LOCK_FORMAT:
        required = f"format {LOCK_FORMAT} or earlier; use a newer sftdist"
        raise DataError(f"{path}: given a lock of format {written}, required {required}")
    if written != LOCK_FORMAT:
        raise _no_lock(path, "it has no format")
    return _lock_of(path, found)


def _lock_of(path: Path, found: dict[str, Any]) -> Lock:
    version, rows = found.get("version"), found.get("rows")
    made_with, history = found.get("made_with"), found.get("history")
    if not isinstance(version, int) or not isinstance(made_with, dict) or not isinstance(history, list):
        raise _no_lock(path, "its version, made_with or history is missing")
    if not isinstance(rows, dict) or not all(isinstance(held, list) for held in rows.values()):
        raise _no_lock(path, "its rows are missing")
    for source, held in rows.items():
        for row in held:
            if not _is_row(row):
                raise _no_lock(path, f"{json.dumps(row)[:80]} of {source} is not [prompt, content, id]")
    return Lock(version, made_with, history, {source: [Held(*row) for row in held] for source, held in rows.items()})


def _is_row(row: object) -> bool:
    if not isinstance(row, list) or len(row) != 3 or not all(isinstance(part, str) for part in row):
        return False
    return all(_DIGEST.fullmatch(part) is not None for part in row[:2])


def _no_lock(path: Path, why: str) -> DataError:
    return DataError(f"{path}: given a file that is no lock of a holdout ({why}), required the committed one")


def _publish(path: Path, lock: Lock, **counts: int) -> Lock:
    """Replace the file in one step; a row a line, in the order of the digests, so that a commit shows what changed."""
    history = [*lock.history, {"version": lock.version, "rows": len(lock), **counts}]
    head = {"format": LOCK_FORMAT, "version": lock.version, "made_with": lock.made_with, "history": history}
    sources = []
    for source, rows in sorted(lock.rows.items()):
        lines = ",\n".join(f"   {json.dumps(list(row))}" for row in rows)
        sources.append(f"  {json.dumps(source)}: [\n{lines}\n  ]")
    fields = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    fields.append(' "rows": {\n' + ",\n".join(sources) + "\n }")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{\n" + ",\n".join(fields) + "\n}\n")
    return replace(lock, history=history)
