"""Checkpoints in our own format: safetensors and JSON, one for every world size, ZeRO stage and tuning method.

A checkpoint (`checkpoint_files` says what it holds) is written to a temporary directory, flushed and renamed; then
`LATEST` names it, and older ones are pruned. So a crash at any instant leaves whole checkpoints only.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import (
    commit_directory,
    read_json,
    remove_path,
    remove_temporaries,
    temporary_directory,
    write_json,
    write_manifest,
    write_text,
)
from sftdist.training.checkpoint_files import (
    FORMAT,
    PART_BYTES,
    PASSED_OVER,
    RANDOM,
    STATE,
    Part,
    age,
    deal,
    directory_name,
    share_tensors,
    step_of,
    steps_in,
    verify,
)
from sftdist.training.engine import Engine, ParameterState
from sftdist.training.random_state import RandomState, random_state, random_tensors, restore_random_state
from sftdist.training.retention import Keep, to_prune
from sftdist.training.tensor_file import write_tensors

LATEST = "LATEST"
_NOT_WRITTEN = (
    "the checkpoint could not be written: {}. Earlier checkpoints are untouched; make room or correct the permissions, "
    "then run the same command again."
)
_POLL_SECONDS = 0.02
_NOT_READ = "the checkpoints cannot be read: {}. Correct the permissions or the disk, then run the same command again."


@dataclass(frozen=True)
class _Captured:
    """What a checkpoint of this rank says beside its tensors, as it was when `save` was called."""

    final: Path
    header: Mapping[str, Any]
    random: RandomState


class Checkpoints:
    """The checkpoints in the folder `root`, for the one run that may write there; `LATEST` stands beside it.

    `base` says what the trained weights belong to (path, revision, content hash). With `background`, a world beside
    the engine's, a save returns as soon as this rank's part has been copied to host memory, and a thread writes it; at
    most one save is under way. Saving, waiting and loading are collective: if one rank fails, every rank raises.
    """

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
        self._keep = keep
        self._base = None if base is None else dict(base)
        self._background = background
        self._part_bytes = part_bytes
        self._under_way: Future[None] | None = None
        self._files_written = 0

    def save(self, engine: Engine, state: Mapping[str, Any], step: int) -> Path:
        """Write a checkpoint of `engine` and of `state` (JSON values of the caller); returns its directory.

        Raises CheckpointError on every rank when one rank cannot write; earlier checkpoints are untouched then. A save
        in the background raises it in the next `save` or `wait`; before that, its directory is not there.
        """
        self.wait()
        final = self._folder / directory_name(step)
        captured = _Captured(final, self._header(engine, state, step), random_state(engine.world.device))
        pieces = _own_pieces(engine, self._part_bytes)
        if self._background is None:
            self._write(engine.world, captured, pieces)
        else:
            world, held = self._background, list(pieces)
            self._under_way = _in_thread(lambda: self._write(world, captured, held))
        return final

    @property
    def failed(self) -> bool:
        """True where this rank knows that the save under way has failed; not a collective."""
        save = self._under_way
        return save is not None and save.done() and save.exception() is not None

    def wait(self) -> None:
        """Returns when the save under way, if any, is published. Raises CheckpointError on every rank if it failed."""
        save, self._under_way = self._under_way, None
        if save is None or self._background is None:
            return
        seen = -1
        while not save.done():
            if seen != self._files_written:  # file by file: a long write is no standstill, one that hangs is
                seen = self._files_written
                self._background.progress.note("waiting for the save in the background")
            time.sleep(_POLL_SECONDS)
        save.result()

    def load_latest(self, engine: Engine, say: Callable[[str], None] = print) -> dict[str, Any] | None:
        """Put the newest checkpoint that verifies into `engine`; returns the state given to `save`, or None where
        there is none. `step`, `path`, `world_size`, `stage` and `precision` of the checkpoint are added under
        "checkpoint".

        `LATEST` is not asked: after a kill between the renaming and `LATEST`, the newest is whole, too. Walks back over
        checkpoints that do not verify, and says so. Raises CheckpointError where none verifies, and where the
        checkpoint belongs to another model, optimizer or base.
        """
        return self._load_first(engine, _on_main(engine.world, self._steps, _NOT_READ), say)

    def load_before(self, step: int, engine: Engine, say: Callable[[str], None] = print) -> dict[str, Any] | None:
        """The same with the newest checkpoint of an earlier step than `step`. It only reads: a run may be writing here,
        and the disk of `LATEST` is not asked."""

        def earlier() -> list[int]:
            return sorted((one for one in steps_in(self._folder) if one < step), reverse=True)

        return self._load_first(engine, _on_main(engine.world, earlier, _NOT_READ), say)

    def _load_first(self, engine: Engine, steps: list[int], say: Callable[[str], None]) -> dict[str, Any] | None:
        """The first of these that verifies."""
        world, found = engine.world, list[str]()
        for step in steps:
            path = self._folder / directory_name(step)
            problems = verify(path, world)
            if not problems:
                return self._load(engine, path, say)
            found += problems
            if world.is_main:
                say(f"checkpoint {path.name} does not verify and is passed over: {'; '.join(problems)}")
        if found:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._folder} verifies: {'; '.join(found[:5])}. Restore one "
                "from a copy, or remove the directory and LATEST beside it to begin again."
            )
        return None

    def _steps(self) -> list[int]:
        """The newest first; what an earlier start left unfinished is removed."""
        self._sweep()
        steps, latest = sorted(steps_in(self._folder), reverse=True), self._folder.parent / LATEST
        if not steps and latest.exists():
            raise OSError(
                f"{latest} names {latest.read_text(encoding='utf-8', errors='replace').strip()}, but {self._folder} "
                "holds no checkpoint (is its disk mounted?); to begin again, remove LATEST"
            )
        return steps

    def _sweep(self) -> None:
        """The run directory is locked, and no save is under way: every temporary name is one that nobody needs."""
        remove_temporaries(self._folder, "step-*")
        remove_temporaries(self._folder.parent, LATEST)

    def _header(self, engine: Engine, state: Mapping[str, Any], step: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": step,
            "saved_at": time.time(),
            "shape": _shape(engine),
            "optimizer": {"name": engine.optimizer.name, "moments": list(engine.optimizer.moments)},
            "counters": engine.counters(),
            "base": self._base,
            "state": copy.deepcopy(dict(state)),
        }

    def _write(self, world: World, captured: _Captured, pieces: Iterable[ParameterState | None]) -> None:
        """Each rank its pieces, rank 0 the rest. `pieces` may gather them one after another, so every rank goes through
        all of its own whatever happens to its disk."""
        temp = Path(_on_main(world, lambda: str(self._room(captured.final)), _NOT_WRITTEN))
        part = Part(temp, world.rank)
        for piece in pieces:
            if piece is None:
                part.flush()
                self._files_written += 1
            else:
                part.add(piece.name, piece.tensors)
        part.flush()
        written = world.gather_objects((part.error, part.files, part.index, captured.random))
        errors = [f"rank {rank}: {error}" for rank, (error, *_) in enumerate(written) if error]

        def finish() -> None:
            try:
                if errors:
                    raise OSError("; ".join(errors))
                rng = write_tensors(random_tensors([random for *_, random in written]), temp / RANDOM)
                index = {name: entry for _, _, entries, _ in written for name, entry in entries.items()}
                write_json(temp / STATE, {**captured.header, "parameters": index})
                self._publish(temp, captured.final, [{RANDOM: rng}, *(files for _, files, *_ in written)])
            finally:  # renamed by now, or else in the way: a full disk needs its room to write down the failure
                shutil.rmtree(temp, ignore_errors=True)

        _on_main(world, finish, _NOT_WRITTEN)

    def _room(self, final: Path) -> Path:
        self._sweep()
        return temporary_directory(final)

    def _publish(self, temp: Path, final: Path, written: Sequence[Mapping[str, Any]]) -> None:
        """Rename, then `LATEST`, then prune. A directory of the same step is one that did not verify: it goes.

        One of a later step did not verify when the run resumed. It may have been the disk's fault of a moment, so it is
        set aside under another name until the run is as far again.
        """
        known = {name: entry for files in written for name, entry in files.items()}
        write_manifest(temp, known)
        if final.exists():
            remove_path(final)
        commit_directory(temp, final, flushed=known)
        write_text(self._folder.parent / LATEST, f"{self._folder.name}/{final.name}\n")
        newest = step_of(final)
        for step in to_prune(steps_in(self._folder), newest, self._keep, self._keep.standing()):
            path = self._folder / directory_name(step)
            if step > newest:
                self._set_aside(path)
            else:
                remove_path(path)
        for step in steps_in(self._folder, PASSED_OVER):
            if step <= newest:
                remove_path(self._folder / f"{directory_name(step)}{PASSED_OVER}")

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(path.name + PASSED_OVER)
        if aside.exists():  # of an earlier walk back, which a kill kept from being removed
            remove_path(aside)
        path.rename(aside)

    def _load(self, engine: Engine, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
        world = engine.world
        header: dict[str, Any] = _on_main(world, lambda: read_json(path / STATE), _NOT_READ)
        self._require_compatible(engine, header, path)
        if world.is_main:
            say(resumption(header, _shape(engine), time.time()))
        engine.load_state(_read_parameters(path, header["parameters"], engine), header["counters"])
        same_ranks = header["shape"]["world_size"] == world.size
        restore_random_state(path / RANDOM, world, header["step"], same_ranks)
        return {**header["state"], "checkpoint": {"step": header["step"], "path": str(path), **header["shape"]}}

    def _require_compatible(self, engine: Engine, header: Mapping[str, Any], path: Path) -> None:
        if header["format"] != FORMAT:
            raise CheckpointError(
                f"{path / STATE}: format {header['format']}, this version reads format {FORMAT}; go on with the "
                "version of sftdist that wrote it, or give another run.dir"
            )
        saved = header["optimizer"]
        if saved["name"] != engine.optimizer.name or tuple(saved["moments"]) != engine.optimizer.moments:
            raise CheckpointError(
                f"{path}: saved with optimizer.name={saved['name']} ({', '.join(saved['moments']) or 'no moments'}), "
                f"but this run has {engine.optimizer.name} ({', '.join(engine.optimizer.moments) or 'no moments'}). "
                "Set the optimizer back, or start a new run."
            )
        if header["base"] != self._base:
            raise CheckpointError(
                f"{path}: it belongs to the base {header['base']}, but this run loaded {self._base}. "
                "Set model.path back to that base, or start a new run."
            )


def checkpoint_bytes(engine: Engine) -> int:
    """The size of a checkpoint of this engine: value and moments of every trainable parameter in float32."""
    elements = sum(shape.numel() for shape in engine.shapes().values())
    return elements * 4 * (1 + len(engine.optimizer.moments))


def resumption(header: Mapping[str, Any], shape: Mapping[str, Any], now: float) -> str:
    """What a resumed run says: from where, how old that is, and how its shape differs; `now` in seconds since 1970."""
    saved_at, saved = header["saved_at"], header["shape"]
    when = datetime.fromtimestamp(saved_at).astimezone().isoformat(" ", "seconds")
    line = f"resuming from step {header['step']}, saved {when} ({age(now - saved_at)} ago)"
    if saved == shape:
        return line
    return f"{line} on {_shape_text(saved)}; this run has {_shape_text(shape)}"


def _shape(engine: Engine) -> dict[str, Any]:
    return {"world_size": engine.world.size, "stage": engine.spec.stage, "precision": engine.spec.precision}


def _shape_text(shape: Mapping[str, Any]) -> str:
    ranks = "1 rank" if shape["world_size"] == 1 else f"{shape['world_size']} ranks"
    return f"{ranks} at ZeRO {shape['stage']} in {shape['precision']}"


def _own_pieces(engine: Engine, part_bytes: int) -> Iterator[ParameterState | None]:
    """The parameters that this rank writes, copied to host memory one after another; None: the file is full.

    Every rank gathers all parameters, and every rank's file is full at the same one: a rank that wrote alone would hold
    up the next gathering, and one file after another would be written instead of all at once.
    """
    world, owners, size = engine.world, deal(engine.shapes(), engine.world.size), 0
    for name, tensors in engine.state():
        world.progress.note("saving a checkpoint")
        if owners[name] == world.rank:
            copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
            yield ParameterState(name, copies)
        size += sum(tensor.nbytes for tensor in tensors.values())
        if size >= part_bytes * world.size:
            size = 0
            yield None


def _read_parameters(path: Path, index: Mapping[str, Any], engine: Engine) -> Iterator[ParameterState]:
    """The parameters in the order of the engine, one after another, those that it does not know last."""
    shapes = engine.shapes()
    names = [*(name for name in shapes if name in index), *(name for name in index if name not in shapes)]
    return (ParameterState(name, tensors) for name, tensors in share_tensors(path, index, names, engine.world))


def _on_main(world: World, work: Callable[[], Any], message: str) -> Any:
    """What `work` returns on rank 0, on every rank; where it fails, every rank raises CheckpointError."""
    value, error = None, None
    if world.is_main:
        try:
            value = work()
        except (OSError, SafetensorError) as failure:
            error = str(failure)
    value, error = world.broadcast_object((value, error))
    if error is not None:
        raise CheckpointError(message.format(error))
    return value


def _in_thread(work: Callable[[], None]) -> Future[None]:
    """Do something in a daemon thread: a process that ends does not wait for it. What it raises, `result` raises."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future
