"""Where rows come from: JSONL, parquet, Hub datasets and objects in memory; all end as conversations.

JSON lines are read as bytes and parsed one by one: no column has a type that a later row could break.
Finding out where the chunks lie (`places`, one process) is apart from reading and parsing them (`read_chunk`,
`parse_chunk`, many), and memory does not grow with the size of a file. Names in chunks are relative to the
files' common folder, so a store does not depend on where its input lay.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from sftdist.core.errors import DataError
from sftdist.core.settings import RowShape
from sftdist.core.storage import sha256_file
from sftdist.data.jsonline import decode_line
from sftdist.data.reader import read_with, reader_source
from sftdist.data.rowerror import RowError, show
from sftdist.data.rowfunction import load_row_function, row_function_source
from sftdist.data.schema import SCHEMA_VERSION, Conversation, Reject, parse

CHUNK_ROWS = 512
CHUNK_BYTES = 4_000_000
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One named source: where it is and how its rows are read. `key` is the option that the user wrote."""

    name: str
    path: str | tuple[str, ...] | None = None
    key: str = "data.train"
    shape: RowShape = RowShape.auto
    row_function: str | None = None
    reader: str | None = None  # of its files, in place of JSON lines and parquet
    hub_split: str = "train"
    hub_config: str | None = None
    hub_revision: str | None = None
    schema_version: int | None = None  # of rows that name none; None: the newest
    label_origin: str | None = None  # of rows that name none
    rows: datasets.Dataset | Iterable[Mapping[str, Any]] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Part:
    """One file or table of a source: `name` goes into the store, `shown` into messages."""

    name: str
    shown: str
    file: Path | None = None
    table: datasets.Dataset | Iterable[Mapping[str, Any]] | None = None
    reader: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive raw rows of one part; a row is (line from 1, bytes of a JSON line or a mapping)."""

    part: int
    rows: list[tuple[int, bytes | Mapping[str, Any]]]
    torn: bool = False  # the file ends without a line end after the last of these rows
    size: int = 0  # bytes of its file, about; 0 for rows of a table


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk of `count` raw rows lies: the bytes start..end of the part's file, of which the first is in line
    `line`, with their CRC-32; a table has no bytes, its `rows` are here. The same input has the same places."""

    part: int
    count: int
    line: int
    start: int = 0
    end: int = 0
    crc: int = 0
    rows: list[tuple[int, Mapping[str, Any]]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is no conversation, with the row itself as it was given."""

    reject: Reject
    row: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What became of a chunk: conversations with their raw rows, in order; rejects; rows a function left out."""

    read: int
    conversations: list[tuple[Conversation, bytes | Mapping[str, Any]]]
    rejected: list[Rejected]
    left_out: int


def in_memory(dataset: Any, name: str, key: str) -> Source:
    """A source of rows in memory: a `datasets.Dataset`, or any iterable of mappings, read once."""
    if isinstance(dataset, Mapping | str | datasets.IterableDataset):
        given = f"{key}: given a {type(dataset).__name__}"
        raise DataError(f"{given}, required a datasets.Dataset (one split) or a list of conversations")
    return Source(name, key=key, rows=dataset if isinstance(dataset, datasets.Dataset) else list(dataset))


# --- finding the parts --------------------------------------------------------------------------------


def parts_of(source: Source) -> list[Part]:
    """The files and tables of a source, in a fixed order; a `DataError` names everything that is missing."""
    if source.rows is not None:
        return [Part("memory", source.key, table=source.rows)]
    entries = (source.path,) if isinstance(source.path, str) else tuple(source.path or ())
    problems: list[str] = []
    files: list[Path] = []
    tables: list[Part] = []
    for entry in entries:
        try:
            if entry.startswith("hub:"):
                tables.append(_hub_part(entry.removeprefix("hub:"), source))
            else:
                files += _files(entry, source.key, any_format=source.reader is not None)
        except DataError as problem:
            problems.append(str(problem))
    if not entries:
        problems.append(f"{source.key}: given nothing, required a file, folder, glob or hub:NAME")
    problems += [f"{file}: given an empty file, required at least one row" for file in files if not file.stat().st_size]
    if problems:
        raise DataError("\n".join(problems))
    return [*_file_parts(files, source.reader), *tables]


def _files(entry: str, key: str, *, any_format: bool) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        there = sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in there if (file.name[0] != "." if any_format else file.suffix in SUFFIXES)]
        if not found:
            wanted = "files" if any_format else f"files of {' '.join(SUFFIXES)}"
            raise DataError(f"{key}: given folder {entry} without matches, required {wanted} in it")
        return found
    if glob.has_magic(entry):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not found:
            raise DataError(f"{key}: given glob {entry} without matches, required at least one file")
        return found
    raise DataError(f"{key}: given {entry}, which does not exist, required a file, folder, glob or hub:NAME")


def _file_parts(files: list[Path], reader: str | None) -> list[Part]:
    if not files:
        return []
    base = Path(os.path.commonpath([file.absolute().parent for file in files]))
    names = [file.absolute().relative_to(base).as_posix() for file in files]
    return [Part(name, str(file), file=file, reader=reader) for name, file in zip(names, files, strict=True)]


def _hub_part(name: str, source: Source) -> Part:
    if source.reader is not None:
        raise DataError(f"{source.key}: given hub:{name} with a reader, which reads files; remove one of the two")
    try:
        table = datasets.load_dataset(name, source.hub_config, split=source.hub_split, revision=source.hub_revision)
    except (FileNotFoundError, ValueError, ConnectionError) as problem:
        required = "a dataset and split that load (see hub_config, hub_split, hub_revision)"
        raise DataError(f"{source.key}: given hub:{name}, required {required}: {problem}") from problem
    return Part(f"hub:{Path(name).name}", f"hub:{name}", table=table)


# --- what the parts hold ------------------------------------------------------------------------------


def fingerprint(source: Source, parts: list[Part]) -> dict[str, Any]:
    """Everything about a source that changes its conversations: the bytes, the shape, the source of the row function
    and, where there is one, of the reader (stores that were made without one keep their key)."""
    reader = {} if source.reader is None else {"reader": reader_source(source.reader)}
    return {
        "input": [[part.name, _file_digest(part.file) if part.file else _table_digest(part)] for part in parts],
        "shape": str(source.shape),
        "labels": [source.schema_version or SCHEMA_VERSION, source.label_origin],
        "row_function": row_function_source(source.row_function) if source.row_function else None,
        **reader,
    }


def _file_digest(file: Path) -> str:
    stat = file.stat()
    return _digest_once(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=10_000)
def _digest_once(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    """A process reads a file once to know its bytes, as long as the file's state says that it was not touched."""
    return sha256_file(file)


def _table_digest(part: Part) -> str:
    found = hashlib.sha256()
    for row in part.table or ():
        found.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return found.hexdigest()


def chunks(parts: Sequence[Part]) -> Iterator[Chunk]:
    """All rows of all parts in order; blank lines are skipped but count as lines."""
    return (read_chunk(place, parts) for place in places(parts))


def places(parts: Sequence[Part]) -> Iterator[Place]:
    """Where the chunks of all parts lie, in order; of a file nothing is kept."""
    for number, part in enumerate(parts):
        if part.file is not None and part.reader is not None:
            yield from _table_places(number, read_with(part.reader, part.file))
        elif part.file is not None and part.file.suffix != ".parquet":
            yield from _line_places(number, part.file)
        else:
            yield from _table_places(number, _parquet_rows(part) if part.file else part.table or ())


def _line_places(part: int, file: Path) -> Iterator[Place]:
    first, start, end, count, size, crc = 1, 0, 0, 0, 0, 0
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            end += len(raw)
            crc = zlib.crc32(raw, crc)
            if raw.isspace() or (number == 1 and not raw.removeprefix(BOM).strip()):
                continue
            count += 1
            size += len(raw)
            if count >= CHUNK_ROWS or size >= CHUNK_BYTES:
                yield Place(part, count, first, start, end, crc)
                first, start, count, size, crc = number + 1, end, 0, 0, 0
    if count:
        yield Place(part, count, first, start, end, crc)


def _table_places(part: int, table: Iterable[Mapping[str, Any]]) -> Iterator[Place]:
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for number, row in enumerate(table, start=1):
        rows.append((number, row))
        if len(rows) >= CHUNK_ROWS:
            yield Place(part, len(rows), rows[0][0], rows=rows)
            rows = []
    if rows:
        yield Place(part, len(rows), rows[0][0], rows=rows)


def read_chunk(place: Place, parts: Sequence[Part]) -> Chunk:
    """The raw rows at a place. `DataError` where the file is not what it was when the place was found."""
    file = parts[place.part].file
    if place.rows is not None or file is None:
        return Chunk(place.part, list(place.rows or ()))
    with file.open("rb") as lines:
        lines.seek(place.start)
        data = lines.read(place.end - place.start)
    if zlib.crc32(data) != place.crc:
        raise not_at_rest(parts)
    rows: list[tuple[int, bytes | Mapping[str, Any]]] = []
    for number, raw in enumerate(data.split(b"\n"), start=place.line):
        line = (raw.removeprefix(BOM) if number == 1 else raw).rstrip(b"\r\n")
        if line.strip():
            rows.append((number, line))
    return Chunk(place.part, rows, torn=not data.endswith(b"\n"), size=len(data))


def _parquet_rows(part: Part) -> Iterable[Mapping[str, Any]]:
    """Row group by row group: nothing is copied into a cache."""
    files = {"train": [glob.escape(str(part.file))]}
    try:
        yield from datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    except (ValueError, OSError) as problem:  # what pyarrow's errors derive from
        raise DataError(f"{part.shown}: given a file that is not parquet ({problem}), required parquet") from problem


def not_at_rest(parts: Iterable[Part]) -> DataError:
    """What is said of files that do not rest."""
    files = ", ".join(part.shown for part in parts)
    return DataError(f"{files}: given a file that changed while it was read, required one that rests; run it again")


# --- from raw rows to conversations -------------------------------------------------------------------


def parse_chunk(chunk: Chunk, source: Source, part: Part) -> Parsed:
    """Parse every row of a chunk; problems are collected, never raised."""
    function = load_row_function(source.row_function) if source.row_function else None
    found = Parsed(len(chunk.rows), [], [], 0)
    left_out = 0
    for i, (line, raw) in enumerate(chunk.rows):
        torn = chunk.torn and i == len(chunk.rows) - 1
        try:
            rows = _rows_of(raw, torn, function)
        except RowError as problem:
            rows, place = [], f"{part.name}:{line}"
            reject = Reject(place, part.name, line, problem.field, problem.given, problem.required, problem.reason)
            found.rejected.append(Rejected(reject, raw_text(raw)))
            continue
        left_out += not rows
        for k, row in enumerate(rows):
            row_id = f"{part.name}:{line}" + (f".{k + 1}" if len(rows) > 1 else "")
            result = parse(
                row,
                source.shape,
                file=part.name,
                line=line,
                id=row_id,
                schema_version=source.schema_version,
                label_origin=source.label_origin,
            )
            if isinstance(result, Conversation):
                found.conversations.append((result, raw))
            else:
                found.rejected.append(Rejected(result, raw_text(raw)))
    return Parsed(found.read, found.conversations, found.rejected, left_out)


def conversations(source: Source) -> Iterator[Conversation | Reject]:
    """Every row of a source in file order, before deduplication and split."""
    parts = parts_of(source)
    for chunk in chunks(parts):
        parsed = parse_chunk(chunk, source, parts[chunk.part])
        rows: list[Conversation | Reject] = [conversation for conversation, _ in parsed.conversations]
        rows += [rejected.reject for rejected in parsed.rejected]
        yield from sorted(rows, key=lambda row: row.line)


def raw_text(raw: bytes | Mapping[str, Any]) -> str:
    """A raw row as text, for the file of bad rows."""
    return raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else show(raw, limit=1_000_000)


def _rows_of(raw: bytes | Mapping[str, Any], torn: bool, function: Callable[[Any], Any] | None) -> list[Any]:
    row = decode_line(raw, torn=torn) if isinstance(raw, bytes) else _plain(raw, drop_nulls=True)
    if function is None:
        return [row]
    try:
        rows = function(row)
    except Exception as problem:  # the user's code: whatever it raises is a problem of this row, and is reported as one
        given = f"{type(problem).__name__}: {problem}"
        raise RowError("row", given, "a row that the row function accepts", "row function failed") from problem
    if rows is None:
        return []
    return [_plain(row, drop_nulls=False) for row in (rows if isinstance(rows, list) else [rows])]


def _plain(value: Any, *, drop_nulls: bool) -> Any:
    """What JSON would hold: objects and lists, arrays of numpy (as pandas has them) too; other values stay as they are.

    Tables fill every key that any row has: an absent key comes back as null, inside tool schemas too.
    """
    try:
        return _as_json(value, drop_nulls)
    except RecursionError:
        raise RowError("row", "values nested too deeply", "a row of messages", "nested too deeply") from None


def _as_json(value: Any, drop_nulls: bool) -> Any:
    if isinstance(value, Mapping):
        kept = ((key, item) for key, item in value.items() if item is not None or not drop_nulls)
        return {key: _as_json(item, drop_nulls) for key, item in kept}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_as_json(item, drop_nulls) for item in value]
    return value
