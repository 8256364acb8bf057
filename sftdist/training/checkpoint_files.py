"""The files of a checkpoint: names, what one rank writes, listing, verifying, reading. No engine is needed.

`step-00000120/` holds, per trainable parameter, its float32 value and the optimizer's moments
(`part-00000-00.safetensors` and so on, dealt to the ranks for writing), the random state of every rank
(`rng.safetensors`), `state.json`, and `manifest.json` with sizes and sha256.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import read_json, read_manifest, verify_directory, verify_files
from sftdist.training.retention import Standing, best_step
from sftdist.training.tensor_file import write_tensors

FORMAT = 1
FOLDER = "checkpoints"  # in the run directory
STATE = "state.json"
RANDOM = "rng.safetensors"
PART_BYTES = 8 * 2**30
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
PASSED_OVER = ".passed-over"  # ends the name of a directory that did not verify: none to resume from
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint on disk. `world_size`, `stage` and `precision` are those it was saved on; `saved_at` in seconds
    since 1970."""

    step: int
    path: Path
    bytes: int
    world_size: int
    stage: int
    precision: str
    saved_at: float


def checkpoints_in(folder: Path) -> list[CheckpointInfo]:
    """Every checkpoint in a folder, oldest step first; nothing is verified."""
    return [describe(folder / directory_name(step)) for step in sorted(steps_in(folder))]


def steps_in(folder: Path, ending: str = "") -> list[int]:
    """The steps of the published checkpoints in a folder, in no order; with `ending=PASSED_OVER` of those that were set
    aside. Raises OSError where it cannot be read."""
    names = os.listdir(folder) if folder.exists() else []
    matches = [_NAME.fullmatch(name.removesuffix(ending)) for name in names if name.endswith(ending)]
    return [int(match[1]) for match in matches if match]


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def find(run_dir: Path, which: str, standing: Standing) -> Path:
    """The checkpoint of a run that is called `latest`, `best`, or by its step, as in `120`.

    Nothing is verified. Raises CheckpointError that lists what is there.
    """
    folder = run_dir / FOLDER
    steps = sorted(steps_in(folder))
    named = {"latest": steps[-1] if steps else None, "best": best_step(steps, standing)}
    step = named[which] if which in named else (int(which) if which.isdecimal() else None)
    if step is not None and step in steps:
        return folder / directory_name(step)
    known = {one: f" ({standing.metric} {value:.4f})" for one, value in standing.values.items()}
    there = ", ".join(f"{one}{known.get(one, '')}" for one in steps)
    raise CheckpointError(
        f"step={which}: required latest, best (by {standing.metric}, where it is known) or one of the steps in "
        f"{folder}: {there or 'there is none'}"
    )


def verify(path: Path, world: World | None = None) -> list[str]:
    """What is wrong with a checkpoint, by file name; empty when it is whole. With `world` the ranks share the hashing,
    and every rank gets the same answer."""
    if world is None or world.size == 1:
        return verify_directory(path)
    listed = None
    if world.is_main:
        problems = verify_directory(path, content=False)
        listed = problems, ({} if problems else read_manifest(path))
    problems, entries = world.broadcast_object(listed)
    readers = deal_files(entries, world.size)
    mine = {name: entry for name, entry in entries.items() if readers[name] == world.rank}
    return problems + [problem for found in world.gather_objects(verify_files(path, mine)) for problem in found]


def describe(path: Path) -> CheckpointInfo:
    """What a checkpoint says about itself, without verifying it; zeros and "" where that cannot be read."""
    world_size, stage, precision, saved_at, size = 0, 0, "", 0.0, 0
    with suppress(OSError, ValueError, KeyError):
        size = sum(file.stat().st_size for file in path.iterdir())
        header = read_json(path / STATE)
        shape, saved_at = header["shape"], header["saved_at"]
        world_size, stage, precision = shape["world_size"], shape["stage"], shape["precision"]
    return CheckpointInfo(step_of(path), path, size, world_size, stage, precision, saved_at)


class Part:
    """What one rank writes. An error is kept for later: the other ranks count on this one in their collectives."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.error: str | None = None
        self.files: dict[str, dict[str, Any]] = {}
        self.index: dict[str, dict[str, Any]] = {}
        self._folder, self._rank = folder, rank
        self._pending: dict[str, Tensor] = {}

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take a parameter's tensors, in host memory, for the next file."""
        if self.error is not None:
            return
        self._pending |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
        self.index[name] = {
            "file": self._file_name(),
            "shape": list(tensors["value"].shape),
            "dtype": "float32",
            "tensors": list(tensors),
        }

    def flush(self) -> None:
        """Write what was taken as one file."""
        if not self._pending or self.error is not None:
            return
        name = self._file_name()
        path = self._folder / name
        try:
            self.files[name] = write_tensors(self._pending, path)
        except (OSError, SafetensorError) as error:
            self.error = f"{path}: {error}"
        self._pending = {}

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


def deal_files(names: Iterable[str], ranks: int) -> dict[str, int]:
    """Which rank reads which file."""
    return {name: number % ranks for number, name in enumerate(sorted(names))}


def read_tensors(path: Path, index: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name, and value and moments, of these parameters, one after another from memory-mapped files."""
    files: dict[str, Any] = {}
    for name in names:
        entry = index[name]
        if entry["file"] not in files:
            files[entry["file"]] = safe_open(path / entry["file"], framework="pt")
        opened = files[entry["file"]]
        yield name, {key: opened.get_tensor(f"{name}/{key}") for key in entry["tensors"]}


def share_tensors(
    path: Path, index: Mapping[str, Any], names: Iterable[str], world: World
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The same on every rank, on its device; each file is read by the rank that `verify` had hash it, which has it in
    its host's page cache. So the ranks of 8 hosts read a checkpoint from a shared file system once, not 8 times."""
    readers = deal_files({entry["file"] for entry in index.values()}, world.size)
    names = list(names)
    mine = read_tensors(path, index, [name for name in names if readers[index[name]["file"]] == world.rank])
    for name in names:
        entry, reader = index[name], readers[index[name]["file"]]
        if reader == world.rank:
            tensors = {key: tensor.to(world.device) for key, tensor in next(mine)[1].items()}
        else:
            tensors = {
                key: torch.empty(entry["shape"], dtype=torch.float32, device=world.device) for key in entry["tensors"]
            }
        yield name, {key: world.broadcast(tensor, reader) for key, tensor in tensors.items()}


def age(seconds: float) -> str:
    """A time that has passed, in the largest unit that it fills: `3 h`."""
    length, unit = next(pair for pair in _UNITS if max(1.0, seconds) >= pair[0])
    return f"{max(1.0, seconds) / length:.0f} {unit}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's directory name says."""
    return int(path.name.removeprefix("step-"))
