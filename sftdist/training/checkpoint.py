"""Checkpoints in our own format: safetensors and JSON, one for every world size, ZeRO stage and tuning method.

A checkpoint (`checkpoint_files` says what it holds) is written to a temporary directory, flushed and renamed; then
`LATEST` names it, and older ones are pruned. So a crash at any instant leaves whole checkpoints only.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import (
    commit_directory,
    read_json,
    remove_directory,
    temporary_directory,
    write_json,
    write_manifest,
    write_text,
)
from sftdist.training.checkpoint_files import (
    FORMAT,
    PART_BYTES,
    RANDOM,
    STATE,
    Part,
    deal,
    directory_name,
    random_tensors,
    read_tensors,
    step_of,
    steps_in,
    verify,
)
from sftdist.training.engine import Engine, ParameterState
from sftdist.training.retention import Keep, to_prune


class Checkpoints:
    """The checkpoints in the folder `root`; `LATEST` stands beside it. `base` says what a LoRA run's adapters belong
    to (path, revision, content hash). Saving and loading are collective: if one rank fails, every rank raises."""

    def __init__(
        self,
        root: Path,
        keep: Keep,
        *,
        base: Mapping[str, Any] | None = None,
        background: World | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._folder = root
        self._latest = root.parent / "LATEST"
        self._keep = keep
        self._background = background
        self._base = None if base is None else dict(base)
        self._part_bytes = part_bytes

    def save(self, engine: Engine, state: Mapping[str, Any], step: int) -> Path:
        """Write a checkpoint of `engine` and of `state` (JSON values of the caller); returns its directory.

        Raises CheckpointError on every rank when one rank cannot write; earlier checkpoints are untouched then.
        """
        world, final = engine.world, self._folder / directory_name(step)
        temp = Path(_on_main(world, lambda: str(temporary_directory(final))))
        part = Part(temp, world.rank, self._part_bytes)
        owners = deal(engine.shapes(), world.size)
        for parameter in engine.state():
            if owners[parameter.name] == world.rank:
                part.add(parameter.name, parameter.tensors)
        part.flush()
        written = world.gather_objects((part.error, part.files, part.index, _random_state(world.device)))
        errors = [f"rank {rank}: {error}" for rank, (error, *_) in enumerate(written) if error]

        def finish() -> None:
            if errors:
                shutil.rmtree(temp, ignore_errors=True)
                raise OSError("; ".join(errors))
            save_file(random_tensors([random for *_, random in written]), temp / RANDOM)
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
            remove_directory(final)
        commit_directory(temp, final)
        write_text(self._latest, f"{self._folder.name}/{final.name}\n")
        for step in to_prune(steps_in(self._folder), step_of(final), self._keep, self._keep.losses()):
            remove_directory(self._folder / directory_name(step))

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


def checkpoint_bytes(engine: Engine) -> int:
    """The size of a checkpoint of this engine: value and moments of every trainable parameter in float32."""
    elements = sum(shape.numel() for shape in engine.shapes().values())
    return elements * 4 * (1 + len(engine.optimizer.moments))


def _read_parameters(path: Path, index: Mapping[str, Any], engine: Engine) -> Iterator[ParameterState]:
    """The parameters in the order of the engine, one after another, those that it does not know last."""
    shapes = engine.shapes()
    names = [*(name for name in shapes if name in index), *(name for name in index if name not in shapes)]
    return (ParameterState(name, tensors) for name, tensors in read_tensors(path, index, names))


def _random_state(device: torch.device) -> dict[str, bytes]:
    state = {"cpu": torch.get_rng_state().numpy().tobytes()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return state


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
