"""Start-up check 10: a small trial save, written, verified and read back; its speed gives the time of a whole one."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sftdist.core import memory
from sftdist.core.distributed import World
from sftdist.core.errors import StartupError
from sftdist.core.grace import torchrun_grace
from sftdist.core.settings import CheckpointSettings
from sftdist.training.checkpoint import checkpoint_bytes
from sftdist.training.checkpoint_files import steps_in
from sftdist.training.engine import Engine
from sftdist.training.retention import AWAITED, EVAL_LOSS
from sftdist.training.startup import check_copy, check_disk, check_grace, ranks_of_this_host, together
from sftdist.training.tensor_file import write_tensors

TRIAL_BYTES = 2**24
TRIAL = "trial"


def save_figures(engine: Engine, run_dir: Path, world: World, settings: CheckpointSettings) -> str:
    """Save, read back and compare some parameters; then room on the disk, room for a copy, and the time of a save.

    With `background` a preemption may find a save under way, which has to end before the last one begins.
    """
    whole = checkpoint_bytes(engine)
    gather, write = trial_seconds(engine, run_dir, world, whole)
    existing = len(steps_in(run_dir / "checkpoints"))
    figures = [check_disk(run_dir, whole, max(1, checkpoints_at_once(settings) - existing))]
    seconds = gather + write
    if settings.background:
        share = whole * ranks_of_this_host(world) // world.size
        figures.append(f"{check_copy(share, memory.free_bytes())}, training waits about {gather:.1f} s for it")
        seconds += write
    figures.append(f"a save takes {check_grace(seconds, settings.grace_seconds, torchrun_grace())}")
    return "; ".join(figures)


def checkpoints_at_once(settings: CheckpointSettings) -> int:
    """How many checkpoints are on the disk at the end of a save: what is kept, the best, those that wait for the watch
    that finds the best, and the one just written.

    Those of `keep_every` are not counted: their number grows with the run.
    """
    waiting = AWAITED if settings.best != EVAL_LOSS else 0
    return max(1, settings.keep_last) + 1 + (1 + waiting) * settings.keep_best


def trial_seconds(engine: Engine, run_dir: Path, world: World, whole: int) -> tuple[float, float]:
    """How long a checkpoint of `whole` bytes would take to gather, and to write, flush and hash; the slowest rank's.

    All ranks write at the same time, as in a save: what they share, a disk or a network, is shared here, too.
    """
    started = time.perf_counter()
    piece, gathered = some_state(engine)
    gathering = world.all_reduce_max(time.perf_counter() - started)
    folder = run_dir / f".{TRIAL}.{world.rank:05d}.tmp"  # a temporary's name: what a kill leaves is swept
    writing = world.all_reduce_max(together(world, lambda: write_and_compare(folder, piece)))
    written = world.size * sum(tensor.nbytes for tensor in piece.values())
    return gathering * whole / gathered, writing * whole / written


def some_state(engine: Engine) -> tuple[dict[str, torch.Tensor], int]:
    """The beginning of the first parameters and moments, about `TRIAL_BYTES` in host memory, and how many bytes were
    gathered for it: an embedding is gathered whole."""
    piece: dict[str, torch.Tensor] = {}
    gathered = held = 0
    for name, tensors in engine.state():
        for key, tensor in tensors.items():
            gathered += tensor.nbytes
            some = tensor.detach().flatten()[: max(1, (TRIAL_BYTES - held) // tensor.element_size())]
            piece[f"{name}|{key}"] = some.to("cpu", copy=True)
            held += some.nbytes
        if gathered >= TRIAL_BYTES:
            break
    return piece, gathered


def write_and_compare(folder: Path, piece: dict[str, torch.Tensor]) -> float:
    """Seconds to write, flush and hash a file in a folder of its own: safetensors writes beside it, too.

    Raises `StartupError` when the disk does not give back what was written.
    """
    path = folder / "trial.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        started = time.perf_counter()
        write_tensors(piece, path)
        seconds = time.perf_counter() - started
        read = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StartupError(
            f"{folder}: a trial save failed ({error}); checkpoints need a writable disk with room. "
            "Free some space, or give another run.dir."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [name for name, tensor in piece.items() if not torch.equal(tensor, read[name])]
    if wrong:
        raise StartupError(
            f"{folder}: read back other values than were written ({', '.join(wrong[:3])}); this disk or file system "
            "cannot be trusted with a checkpoint. Give another run.dir."
        )
    return seconds
