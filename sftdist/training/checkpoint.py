"""Checkpoints in our own format: safetensors and JSON, one for every world size, ZeRO stage and tuning method.

`checkpoints/step-00000120/` holds, per trainable parameter, its float32 value and the optimizer's moments
(`part-00000-00.safetensors` and so on, dealt to the ranks for writing), the random state of every rank
(`rng.safetensors`), `state.json`, and `manifest.json` with sizes and sha256. It is written to a temporary directory,
flushed and renamed; then `LATEST` names it. So a crash at any instant leaves whole checkpoints only.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import (
    MANIFEST,
    commit_directory,
    read_json,
    sha256_file,
    temporary_directory,
    verify_directory,
    write_json,
    write_manifest,
    write_text,
)
from sftdist.training.engine import Engine, ParameterState

FORMAT = 1
STATE = "state.json"
RANDOM = "rng.safetensors"
_NAME = re.compile(r"step-(\d{8,})")
_PART_BYTES = 8 * 2**30


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint on disk. `world_size` and `stage` are those it was saved on; `saved_at` in seconds since 1970."""

    step: int
    path: Path
    bytes: int
    world_size: int
    stage: int
    saved_at: float


class Checkpoints:
    """The checkpoints in the folder `root`; `LATEST` stands beside it. `base` says what a LoRA run's adapters belong
    to (path, revision, content hash). Saving and loading are collective: if one rank fails, every rank raises."""

    def __init__(
        self, root: Path, keep_last: int, *, base: Mapping[str, Any] | None = None, part_bytes: int = _PART_BYTES
    ) -> None:
        self._folder = root
        self._latest = root.parent / "LATEST"
        self._keep_last = max(1, keep_last)
        self._base = None if base is None else dict(base)
        self._part_bytes = part_bytes

    def save(self, engine: Engine, state: Mapping[str, Any], step: int) -> Path:
        """Write a checkpoint of `engine` and of `state` (JSON values of the caller); returns its directory.

        Raises CheckpointError on every rank when one rank cannot write; earlier checkpoints are untouched then.
        """
        world, final = engine.world, self._folder / directory_name(step)
        temp = Path(_on_main(world, lambda: str(temporary_directory(final))))
        part = _Part(temp, world.rank, self._part_bytes)
        owners = deal(engine.shapes(), world.size)
        for parameter in engine.state():
            if owners[parameter.name] == world.rank:
                part.add(parameter)
        part.flush()
        written = world.gather_objects((part.error, part.files, part.index, _random_state(world.device)))
        errors = [f"rank {rank}: {error}" for rank, (error, *_) in enumerate(written) if error]

        def finish() -> None:
            if errors:
                shutil.rmtree(temp, ignore_errors=True)
                raise OSError("; ".join(errors))
            save_file(_random_tensors([random for *_, random in written]), temp / RANDOM)
            write_json(temp / STATE, self._header(engine, state, step, [index for _, _, index, _ in written]))
            write_manifest(temp, known={name: entry for _, files, *_ in written for name, entry in files.items()})
            self._publish(temp, final)

        _on_main(world, finish)
        return final

    def load_latest(self, engine: Engine, say: Callable[[str], None] = print) -> dict[str, Any] | None:
        """Put the newest checkpoint that verifies into `engine`; returns the state given to `save`, or None where
        there is none. `step`, `path`, `world_size` and `stage` of the checkpoint are added under "checkpoint".

        Walks back over checkpoints that do not verify, and says so. Raises CheckpointError where none verifies, and
        where the checkpoint belongs to another model, optimizer or base.
        """
        steps = engine.world.broadcast_object(sorted(steps_in(self._folder), reverse=True))
        found: list[str] = []
        for step in steps:
            path = self._folder / directory_name(step)
            problems = verify(path, engine.world)
            if not problems:
                return self._load(engine, path)
            found += problems
            if engine.world.is_main:
                say(f"checkpoint {path.name} does not verify and is passed over: {'; '.join(problems)}")
        if found:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._folder} verifies: {'; '.join(found[:5])}. Restore one "
                "from a copy, or remove the directory to begin again."
            )
        return None

    def _header(
        self, engine: Engine, state: Mapping[str, Any], step: int, indices: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": step,
            "saved_at": time.time(),
            "shape": {"world_size": engine.world.size, "stage": engine.spec.stage, "precision": engine.spec.precision},
            "optimizer": {"name": engine.optimizer.name, "moments": list(engine.optimizer.moments)},
            "counters": engine.counters(),
            "base": self._base,
            "state": dict(state),
            "parameters": {name: entry for index in indices for name, entry in index.items()},
        }

    def _publish(self, temp: Path, final: Path) -> None:
        """Rename, then `LATEST`, then prune. A directory of the same step is one that did not verify: it goes."""
        if final.exists():
            _remove(final)
        commit_directory(temp, final)
        write_text(self._latest, f"{self._folder.name}/{final.name}\n")
        for step in to_prune(steps_in(self._folder), _step_of(final), self._keep_last):
            _remove(self._folder / directory_name(step))

    def _load(self, engine: Engine, path: Path) -> dict[str, Any]:
        header = read_json(path / STATE)
        self._require_compatible(engine, header, path)
        engine.load_state(_read_parameters(path, header["parameters"], engine), header["counters"])
        world, shape = engine.world, header["shape"]
        same = shape["world_size"] == world.size
        _restore_random_state(path / RANDOM, world, header["step"], same)
        origin = {"step": header["step"], "path": str(path), **shape}
        return {**header["state"], "checkpoint": origin}

    def _require_compatible(self, engine: Engine, header: Mapping[str, Any], path: Path) -> None:
        if header["format"] != FORMAT:
            raise CheckpointError(f"{path / STATE}: format {header['format']}; this version reads format {FORMAT}")
        saved = header["optimizer"]
        if saved["name"] != engine.optimizer.name or tuple(saved["moments"]) != engine.optimizer.moments:
            raise CheckpointError(
                f"{path}: saved with optimizer.name={saved['name']} ({', '.join(saved['moments']) or 'no moments'}), "
                f"but this run has {engine.optimizer.name} ({', '.join(engine.optimizer.moments) or 'no moments'}). "
                "Set the optimizer back, or start a new run."
            )
        if header["base"] != self._base:
            raise CheckpointError(
                f"{path}: its adapters belong to the base {header['base']}, but this run loaded {self._base}. "
                "Set model.path back to that base, or start a new run."
            )


class _Part:
    """What one rank writes. An error is kept for later: the other ranks count on this one in their collectives."""

    def __init__(self, folder: Path, rank: int, limit: int) -> None:
        self.error: str | None = None
        self.files: dict[str, dict[str, Any]] = {}
        self.index: dict[str, dict[str, Any]] = {}
        self._folder, self._rank, self._limit = folder, rank, limit
        self._pending: dict[str, Tensor] = {}
        self._size = 0

    def add(self, parameter: ParameterState) -> None:
        """Copy a parameter's tensors to host memory; write them when there are enough for a file."""
        if self.error is not None:
            return
        for key, tensor in parameter.tensors.items():
            copy = tensor.detach().to("cpu", copy=True).contiguous()
            self._pending[f"{parameter.name}/{key}"] = copy
            self._size += copy.nbytes
        self.index[parameter.name] = {
            "file": self._file_name(),
            "shape": list(parameter.tensors["value"].shape),
            "dtype": "float32",
            "tensors": list(parameter.tensors),
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
            _fsync(path)
            self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        except (OSError, SafetensorError) as error:
            self.error = f"{path}: {error}"
        self._pending, self._size = {}, 0

    def _file_name(self) -> str:
        return f"part-{self._rank:05d}-{len(self.files):02d}.safetensors"


def checkpoints_in(folder: Path) -> list[CheckpointInfo]:
    """Every checkpoint in a folder, oldest step first; nothing is verified."""
    return [describe(folder / directory_name(step)) for step in sorted(steps_in(folder))]


def steps_in(folder: Path) -> list[int]:
    """The steps of the published checkpoints in a folder, in no order."""
    matches = [_NAME.fullmatch(path.name) for path in folder.glob("step-*")]
    return [int(match[1]) for match in matches if match]


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def deal(shapes: Mapping[str, torch.Size], ranks: int) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to the rank with the least so far."""
    loads = [0] * ranks
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += shape.numel()
    return owners


def to_prune(steps: Sequence[int], newest: int, keep_last: int) -> list[int]:
    """The steps to remove after `newest` was written: of it and all before it, the last `keep_last` stay.

    Steps after `newest` did not verify when the run resumed: they are out of date, and go.
    """
    kept = sorted(step for step in steps if step <= newest)[-keep_last:]
    return [step for step in steps if step not in kept]


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
        return CheckpointInfo(_step_of(path), path, size, 0, 0, 0.0)
    return CheckpointInfo(_step_of(path), path, size, shape["world_size"], shape["stage"], saved_at)


def checkpoint_bytes(engine: Engine) -> int:
    """The size of a checkpoint of this engine: value and moments of every trainable parameter in float32."""
    elements = sum(shape.numel() for shape in engine.shapes().values())
    return elements * 4 * (1 + len(engine.optimizer.moments))


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read_parameters(path: Path, index: Mapping[str, Any], engine: Engine) -> Iterator[ParameterState]:
    """The parameters in the order of the engine, one after another, from memory-mapped files."""
    names = [*(name for name in engine.shapes() if name in index), *(n for n in index if n not in engine.shapes())]
    files: dict[str, Any] = {}
    for name in names:
        entry = index[name]
        if entry["file"] not in files:
            files[entry["file"]] = safe_open(path / entry["file"], framework="pt")
        opened = files[entry["file"]]
        yield ParameterState(name, {key: opened.get_tensor(f"{name}/{key}") for key in entry["tensors"]})


def _random_state(device: torch.device) -> dict[str, bytes]:
    state = {"cpu": torch.get_rng_state().numpy().tobytes()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return state


def _random_tensors(states: Sequence[Mapping[str, bytes]]) -> dict[str, Tensor]:
    return {
        f"{kind}/{rank:05d}": torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for rank, state in enumerate(states)
        for kind, data in state.items()
    }


def _restore_random_state(path: Path, world: World, step: int, same_ranks: bool) -> None:
    """Each rank's own random state; on another number of ranks, one that follows from step and rank."""
    if not same_ranks:
        torch.manual_seed(step * 1_000_003 + world.rank)
        return
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor(f"cpu/{world.rank:05d}"))
        if world.device.type == "cuda" and f"cuda/{world.rank:05d}" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor(f"cuda/{world.rank:05d}"), world.device)


def _on_main(world: World, work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; where it fails, every rank raises CheckpointError."""
    value, error = None, None
    if world.is_main:
        try:
            value = work()
        except (OSError, SafetensorError) as failure:
            error = str(failure)
    value, error = world.broadcast_object((value, error))
    if error is not None:
        raise CheckpointError(
            f"the checkpoint could not be written: {error}. Earlier checkpoints are untouched; make room or correct "
            "the permissions, then run the same command again."
        )
    return value


def _remove(path: Path) -> None:
    """Rename first, so that a half-removed directory is never taken for a checkpoint."""
    dying = path.with_name(f".{path.name}.removed")
    shutil.rmtree(dying, ignore_errors=True)
    path.rename(dying)
    shutil.rmtree(dying)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
