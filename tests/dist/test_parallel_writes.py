"""A save of several files a rank: all ranks write at once, none while the others wait to gather with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sftdist.core.distributed import World
from sftdist.training import checkpoint_files
from sftdist.training.checkpoint import Checkpoints, checkpoint_bytes
from sftdist.training.retention import Keep
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, Case, make_engine, packs_of, train_step

SECONDS = 0.3  # that a disk takes for one file


def save_on_a_slow_disk(world: World, folder: Path) -> tuple[int, float]:
    """Files that this rank wrote, and the seconds of the save."""
    original, written = checkpoint_files.write_tensors, list[Path]()

    def slow(tensors: Any, path: Path, *more: Any) -> Any:
        if path.name.startswith("part-"):
            time.sleep(SECONDS)
            written.append(path)
        return original(tensors, path, *more)

    checkpoint_files.write_tensors = slow  # type: ignore[assignment]
    engine = make_engine(Case(2, optimizer=ADAMW, changes={"num_hidden_layers": 8}), world)
    train_step(engine, world, packs_of(0, 6), 1e-3)
    checkpoints = Checkpoints(folder / "checkpoints", Keep(), part_bytes=checkpoint_bytes(engine) // world.size // 8)
    world.barrier()
    began = time.monotonic()
    checkpoints.save(engine, {}, 1)
    seconds = time.monotonic() - began
    engine.close()
    return len(written), seconds


def test_ranks_write_their_files_at_the_same_time(tmp_path: Path) -> None:
    ranks = run_ranks(save_on_a_slow_disk, 3, tmp_path)
    files = sum(count for count, _ in ranks)
    assert files >= 18
    for _, seconds in ranks:
        assert seconds < 0.7 * files * SECONDS, "one after another"
