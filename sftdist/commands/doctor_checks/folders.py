"""The folders that training writes to: whether it can, and how much room there is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftdist.commands.doctor_checks.finding import GIB, Finding, note, ok, problem, size

SHARED_MEMORY = Path("/dev/shm")
_TRIAL_BYTES = 2**16
_LEAST = 1 * GIB  # below, nothing of use fits
_ROOMY = 50 * GIB
_SHARED = 1 * GIB
_SIZES = (
    "A checkpoint of a full fine-tune takes 12 bytes per parameter and 3 lie there at a time by default: 34 GiB per "
    "billion parameters; LoRA takes far less. sftdist train compares its own need with the room when it starts."
)


@dataclass(frozen=True)
class Folder:
    """`path` as given, absolute; `tried`: the folder itself, or the nearest one above it that exists; bytes; `error`:
    why a file could not be written there."""

    path: str
    tried: str
    free: int
    total: int
    error: str = ""


@dataclass(frozen=True)
class Folders:
    runs: Folder
    stores: Folder
    shared_memory: Folder | None  # None: this system has none
    hub_cache: Folder | None  # None: the hub's library could not be asked


def look(runs: Path, stores: Path, hub_cache: str) -> Folders:
    return Folders(
        runs=_folder(runs),
        stores=_folder(stores),
        shared_memory=_folder(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None,
        hub_cache=_folder(Path(hub_cache)) if hub_cache else None,
    )


def _folder(path: Path) -> Folder:
    path = path.expanduser().absolute()
    tried = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(tried)
    return Folder(str(path), str(tried), usage.free, usage.total, _trial(tried))


def _trial(folder: Path) -> str:
    """Write a small file, to the disk, and remove it again; "" where that works."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sftdist-doctor-") as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def findings(found: Folders, gpus: int) -> Iterator[Finding]:
    """`gpus`: how many torch sees."""
    yield _written(
        "runs-folder", found.runs, "Give the folder of another disk: run.dir=..., and look again with --dir."
    )
    yield _written("stores-folder", found.stores, "Give the folder of another disk: data.store_dir=...")
    yield _cache(found.hub_cache)
    yield _shared(found.shared_memory, gpus)


def _written(name: str, folder: Folder, elsewhere: str) -> Finding:
    if folder.error:
        return problem(
            name, f"{_where(folder)}: nothing can be written there: {folder.error}; {_room(folder)}", elsewhere
        )
    text = f"{_where(folder)}: {_room(folder)}"
    if folder.free < _LEAST:
        return problem(name, f"{text}, which is too little for any run", f"Make room. {elsewhere}")
    if folder.free < _ROOMY and name == "runs-folder":
        return note(name, text, _SIZES)
    return ok(name, text)


def _cache(folder: Folder | None) -> Finding:
    if folder is None:
        return note("hub-cache", "its place is not known, since the packages cannot be imported")
    text = f"{_where(folder)}: {_room(folder)}"
    if folder.error:
        text = f"{_where(folder)}: nothing can be written there: {folder.error}"
        return note("hub-cache", text, "Models given by name cannot be downloaded; set HF_HOME to a folder of yours.")
    if folder.free < _LEAST:
        return note("hub-cache", text, "Too little to download a model by name; set HF_HOME to a folder with room.")
    return ok("hub-cache", text)


def _shared(folder: Folder | None, gpus: int) -> Finding:
    if folder is None:
        return ok("shared-memory", f"there is no {SHARED_MEMORY} on this system")
    text = f"{folder.path}: {_room(folder)}"
    if gpus > 1 and (folder.error or folder.free < _SHARED):
        why = f"{folder.error}; " if folder.error else ""
        advice = "NCCL exchanges data there. Start a container with --shm-size=8g, or with --ipc=host."
        return note("shared-memory", f"{why}{text}, which is little for {gpus} GPUs", advice)
    return ok("shared-memory", text)


def _where(folder: Folder) -> str:
    return folder.path if folder.path == folder.tried else f"{folder.path} (to be made below {folder.tried})"


def _room(folder: Folder) -> str:
    return f"{size(folder.free) if folder.free else 'nothing'} free of {size(folder.total)}"
