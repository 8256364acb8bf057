"""Files that are either whole or not there: atomic JSON, JSON lines, directories published with a manifest."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sftdist.core.errors import DiskError

FORMAT = 1
_FOR_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
MANIFEST = "manifest.json"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no spaces, UTF-8), in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk in the block names `path`; that of a write names no file by itself."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def disk_explained(folder: Path, then: str = "it goes on from its last checkpoint") -> Iterator[None]:
    """What only the user can mend about the disk of `folder` is a DiskError that says so; other errors pass. `then`:
    what the same command does when it is run again."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FOR_THE_USER:
            raise
        raise DiskError(
            f"{error.filename or folder}: {error.strerror}, but the run has to write there. Make room or correct the "
            f"permissions, then run the same command again: {then}."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, after a crash too."""
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(path):
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
    write_text(path, _json_text(value))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
    remove_abandoned(final)
    temp = _temporary_name(final)
    temp.mkdir()
    return temp


def remove_abandoned(final: Path) -> None:
    """Remove what processes of this host that are dead by now left while they wrote or removed `final`."""
    for left in final.parent.glob(f".{glob.escape(final.name)}.@*@*@*.tmp"):
        _, host, pid, _ = left.name.removesuffix(".tmp").rsplit("@", 3)
        if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove all that was left, by any process of any host, while something called `name` (a pattern) was written or
    removed in `folder`. Only for one who knows that nobody else writes there."""
    for left in folder.glob(f".{name}.*.tmp"):
        _remove(left)


def remove_path(path: Path) -> None:
    """Remove a directory or a file; renamed first, so that a half-removed one is never taken for a whole one."""
    dying = _temporary_name(path)
    path.rename(dying)
    _remove(dying)


def _temporary_name(final: Path) -> Path:
    return final.with_name(f".{final.name}.@{socket.gethostname()}@{os.getpid()}@{uuid.uuid4().hex[:8]}.tmp")


def _remove(path: Path) -> None:
    """As far as it goes: a network file system keeps what another process has open, and a later sweep removes it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def write_manifest(
    folder: Path,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    name: str = MANIFEST,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `folder/manifest.json` over every file below; `known` holds entries that need no second reading.

    A known file is in it even where a network file system does not list yet what another host has made. `name`: another
    one for the file; `facts`: what else stands in it. Raises OSError where a file is not there.
    """
    known = known or {}
    entries = {}
    for listed in sorted({*_file_names(folder, name), *known}):
        file = folder / listed
        size = file.stat().st_size
        entries[listed] = dict(known.get(listed) or {"bytes": size, "sha256": sha256_file(file)})
    manifest = {"format": FORMAT, **(facts or {}), "files": entries}
    write_json(folder / name, manifest)
    return manifest


def commit_directory(temp: Path, final: Path, flushed: Collection[str] = ()) -> bool:
    """Flush everything below `temp` to disk, then rename it to `final`; False where `final` is already there.

    `flushed`: files that are on the disk already.
    """
    for path in [*temp.rglob("*"), temp]:
        if path.relative_to(temp).as_posix() not in flushed:
            fsync(path)
    try:
        temp.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        return False
    fsync(final.parent)
    return True


def read_manifest(folder: Path, *, name: str = MANIFEST) -> dict[str, dict[str, Any]]:
    """The entries of a directory's manifest by file name. Raises OSError, and ValueError where it is none of ours."""
    text = (folder / name).read_bytes().decode("utf-8")  # as it is: read_text would translate line ends
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("it lists no files")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"format {manifest.get('format')}, this version reads format {FORMAT}")
    entries: dict[str, dict[str, Any]] = manifest["files"]
    for listed, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise ValueError(f"its entry for {listed!r} does not consist of bytes and sha256")
    if text != _json_text(manifest):
        raise ValueError("it is not as it was written")
    return entries


def verify_directory(path: Path, *, content: bool = True, name: str = MANIFEST) -> list[str]:
    """Problems of a published directory, each with its file name; empty where it is what its manifest says.

    `content=False` compares names and sizes only, without reading the files. `name`: that of the manifest.
    """
    manifest = path / name
    try:
        entries = read_manifest(path, name=name)
        extra = sorted(set(_file_names(path, name)) - set(entries))
    except FileNotFoundError:
        return [f"{manifest}: missing; the directory was never published whole"]
    except (OSError, ValueError) as error:
        return [f"{manifest}: unreadable ({_reason(error)})"]
    problems = verify_files(path, entries, content=content, manifest=name)
    return [f"{path / file}: not in {name}" for file in extra] + problems


def verify_files(
    folder: Path, entries: Mapping[str, Mapping[str, Any]], *, content: bool = True, manifest: str = MANIFEST
) -> list[str]:
    """Problems of these files, each with its name; `content=False` compares sizes only."""
    found = (_problem(folder / name, entry, content, manifest) for name, entry in entries.items())
    return [problem for problem in found if problem is not None]


def fsync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _problem(file: Path, entry: Mapping[str, Any], content: bool, manifest: str) -> str | None:
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file}: {size} bytes, {manifest} says {entry['bytes']}"
        if content and sha256_file(file) != entry["sha256"]:
            return f"{file}: its sha256 is not the one in {manifest}; one of the two has changed"
    except FileNotFoundError:
        return f"{file}: missing, but in {manifest}"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"{file}: unreadable ({_reason(error)})"
    return None


def _reason(error: OSError | ValueError) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)


def _file_names(folder: Path, manifest: str) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [name for path in files if (name := path.relative_to(folder).as_posix()) != manifest]


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    end = size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end != size:
        os.ftruncate(descriptor, end)
