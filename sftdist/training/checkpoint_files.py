"""The files of a checkpoint: names, what one rank writes, listing, verifying, reading. No engine is needed.

`step-00000120/` holds, per trainable parameter, its float32 value and the optimizer's moments
(`part-00000-00.safetensors` and so on, dealt to the ranks for writing), the random state of every rank
(`rng.safetensors`), `state.json`, and `manifest.json` with sizes and sha256.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import MANIFEST, fsync, read_json, sha256_file, verify_directory
from sftdist.training.retention import best_step

FORMAT = 1
FOLDER = "checkpoints"  # in the run directory
STATE = "state.json"
RANDOM = "rng.safetensors"
PART_BYTES = 8 * 2**30
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint on disk. `world_size` and `stage` are those it was saved on; `saved_at` in seconds since 1970."""

    step: int
    path: Path
    bytes: int
    world_size: int
    stage: int
    saved_at: float


def checkpoints_in(folder: Path) -> list[CheckpointInfo]:
    """Every checkpoint in a folder, oldest step first; nothing is verified."""
    return [describe(folder / directory_name(step)) for step in sorted(steps_in(folder))]


def steps_in(folder: Path) -> list[int]:
    """The steps of the published checkpoints in a folder, in no order."""
    matches = [_NAME.fullmatch(path.name) for path in folder.glob("step-*")]
    return [int(match[1]) for match in matches if match]


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def find(run_dir: Path, which: str, losses: Mapping[int, float]) -> Path:
    """The checkpoint of a run that is called `latest`, `best` (the lowest of `losses`), or by its step, as in `120`.

    Nothing is verified. Raises CheckpointError that lists what is there.
    """
    folder = run_dir / FOLDER
    steps = sorted(steps_in(folder))
    named = {"latest": steps[-1] if steps else None, "best": best_step(steps, losses)}
    step = named[which] if which in named else (int(which) if which.isdecimal() else None)
    if step is not None and step in steps:
        return folder / directory_name(step)
    there = ", ".join(f"{one} (eval/loss {losses[one]:.4f})" if one in losses else str(one) for one in steps)
    raise CheckpointError(
        f"checkpoint={which}: required latest, best (an evaluated step) or one of the steps in {folder}: "
        f"{there or 'there is none'}"
    )


def verify(path: Path, world: World | None = None) -> list[str]:
    """What is wrong with a checkpoint, by file name; empty when it is whole. With `world` the ranks share the hashing,
    and every rank gets the same answer."""
    if world is None or world.size == 1:
        return verify_directory(path)
    problems: list[str] = world.broadcast_object(verify_directory(path, content=False) if world.is_main else None)
    if problems:
        return problems
    entries = sorted(read_json(path / MANIFEST)["files"].items())[world.rank :: world.size]
    changed = [
        f"{path / name}: its sha256 is not the manifest's; the content has changed"
        for name, entry in entries
        if sha256_file(path / name) != entry["sha256"]
    ]
    return [problem for part in world.gather_objects(changed) for problem in part]


def describe(path: Path) -> CheckpointInfo:
    """What a checkpoint says about itself, without verifying it; zeros where `state.json` cannot be read."""
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    try:
        header = read_json(path / STATE)
        shape, saved_at = header["shape"], header["saved_at"]
    except (OSError, ValueError, KeyError):
        return CheckpointInfo(step_of(path), path, size, 0, 0, 0.0)
    return CheckpointInfo(step_of(path), path, size, shape["world_size"], shape["stage"], saved_at)


class Part:
    """What one rank writes. An error is kept for later: the other ranks count on this one in their collectives."""

    def __init__(self, folder: Path, rank: int, limit: int) -> None:
        self.error: str | None = None
        self.files: dict[str, dict[str, Any]] = {}
        self.index: dict[str, dict[str, Any]] = {}
        self._folder, self._rank, self._limit = folder, rank, limit
        self._pending: dict[str, Tensor] = {}
        self._size = 0

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy a parameter's tensors to host memory; write them when there are enough for a file."""
        if self.error is not None:
            return
        for key, tensor in tensors.items():
            copy = tensor.detach().to("cpu", copy=True).contiguous()
            self._pending[f"{name}/{key}"] = copy
            self._size += copy.nbytes
        self.index[name] = {
            "file": self._file_name(),
            "shape": list(tensors["value"].shape),
            "dtype": "float32",
            "tensors": list(tensors),
        }
        if self._size >= self._limit:
            self.flush()

    def flush(self) -> None:
        if not self._pending or self.error is not None:
            return
        name = self._file_name()
        path = self._folder / name
        try:
            save_file(self._pending, path)
            fsync(path)
            self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        except (OSError, SafetensorError) as error:
            self.error = f"{path}: {error}"
        self._pending, self._size = {}, 0

    def _file_name(self) -> str:
        return f"part-{self._rank:05d}-{len(self.files):02d}.safetensors"


def deal(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to the rank with the least so far."""
    loads = [0] * ranks
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += shape.numel()
    return owners


def read_tensors(path: Path, index: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name, and value and moments, of these parameters, one after another from memory-mapped files."""
    files: dict[str, Any] = {}
    for name in names:
        entry = index[name]
        if entry["file"] not in files:
            files[entry["file"]] = safe_open(path / entry["file"], framework="pt")
        opened = files[entry["file"]]
        yield name, {key: opened.get_tensor(f"{name}/{key}") for key in entry["tensors"]}


def random_tensors(states: Sequence[Mapping[str, bytes]]) -> dict[str, Tensor]:
    return {
        f"{kind}/{rank:05d}": torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for rank, state in enumerate(states)
        for kind, data in state.items()
    }


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory name says."""
    return int(path.name.removeprefix("step-"))
