"""Files that are either whole or not there: atomic JSON, JSON lines, directories published with a manifest."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces, UTF-8), in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, after a crash too."""
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; `value` is written indented, keys in their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows as JSON lines, all or none with respect to other writers; a torn last line is cut off first."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _cut_torn_line(file.fileno())
        file.write(data)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line without its newline was torn by a crash and is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.strip():
                yield json.loads(line)


@contextmanager
def publish_directory(final: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `final` in one rename, with a manifest, when the block succeeds.

    The manifest is `{"format": 1, "files": {name: {"bytes", "sha256"}}}`. Where `final` appears meanwhile,
    another process has won and this copy is dropped; after an exception nothing is left.
    """
    temp = temporary_directory(final)
    try:
        yield temp
        write_manifest(temp)
        commit_directory(temp, final)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def temporary_directory(final: Path) -> Path:
    """Make a directory beside `final` to write into, and remove those that dead processes left for the same name."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{glob.escape(final.name)}.@*@*@*.tmp"):
        _, host, pid, _ = left.name.removesuffix(".tmp").rsplit("@", 3)
        if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    temp = final.with_name(f".{final.name}.@{socket.gethostname()}@{os.getpid()}@{uuid.uuid4().hex[:8]}.tmp")
    temp.mkdir()
    return temp


def write_manifest(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Write `folder/manifest.json` over every file below; `known` holds entries that need no second reading."""
    known = known or {}
    entries = {}
    for name in _file_names(folder):
        file = folder / name
        entries[name] = dict(known.get(name) or {"bytes": file.stat().st_size, "sha256": sha256_file(file)})
    manifest = {"format": FORMAT, "files": entries}
    write_json(folder / MANIFEST, manifest)
    return manifest


def commit_directory(temp: Path, final: Path) -> bool:
    """Flush everything below `temp` to disk, then rename it to `final`; False where `final` is already there."""
    for path in [*temp.rglob("*"), temp]:
        fsync(path)
    try:
        temp.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        return False
    fsync(final.parent)
    return True


def remove_directory(path: Path) -> None:
    """Rename first, so that a half-removed directory is never taken for a whole one."""
    dying = path.with_name(f".{path.name}.removed")
    shutil.rmtree(dying, ignore_errors=True)
    path.rename(dying)
    shutil.rmtree(dying)


def fsync(path: Path) -> None:
    """Wait until a file or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_directory(path: Path, *, content: bool = True) -> list[str]:
    """Problems of a published directory, each with its file name; empty where it is what its manifest says.

    `content=False` compares names and sizes only, without reading the files.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        return [f"{manifest}: missing; the directory was never published whole"]
    try:
        stored = read_json(manifest)
        found, entries = stored["format"], stored["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{manifest}: unreadable ({error})"]
    if found != FORMAT:
        return [f"{manifest}: format {found}, this version reads format {FORMAT}"]
    names = set(_file_names(path))
    problems = [f"{path / name}: not in the manifest" for name in sorted(names - set(stored["files"]))]
    for name, entry in entries:
        file = path / name
        if name not in names:
            problems.append(f"{file}: missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{file}: {file.stat().st_size} bytes, the manifest says {entry['bytes']}")
        elif content and sha256_file(file) != entry["sha256"]:
            problems.append(f"{file}: its sha256 is not the manifest's; the content has changed")
    return problems


def _file_names(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [name for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST]


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    end = size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end != size:
        os.ftruncate(descriptor, end)
