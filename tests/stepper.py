"""A trainer of a few lines whose steps need every rank: `python -m tests.stepper RUN_DIR STEPS LOST_SECONDS`."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sftdist.core.distributed import World, die_with_parent, session
from sftdist.core.failure import Failure, print_failure, write_failure
from sftdist.core.storage import read_json, write_json

START = {"step": 0, "value": 0.5}


def state_file(run_dir: Path) -> Path:
    return run_dir / "state.json"


def part(state: dict[str, Any], rank: int) -> torch.Tensor:
    """One rank's share of a step."""
    generator = torch.Generator().manual_seed(1000 * rank + state["step"])
    return torch.rand(1, dtype=torch.float64, generator=generator) * state["value"]


def after(state: dict[str, Any], total: torch.Tensor) -> dict[str, Any]:
    return {"step": state["step"] + 1, "value": 0.5 + 0.25 * float(total)}


def train(world: World, run_dir: Path, steps: int) -> None:
    path = state_file(run_dir)
    state = world.broadcast_object(read_json(path) if world.is_main and path.exists() else START)
    while state["step"] < steps:
        world.progress.begin_step(state["step"] + 1, [f"row-{state['step'] + 1}"])
        state = after(state, world.all_reduce_sum(part(state, world.rank)))
        if world.is_main:
            write_json(path, state)
        time.sleep(0.05)


def report(run_dir: Path, failure: Failure) -> None:
    print_failure(failure)
    write_failure(run_dir, failure)


def main(run_dir: Path, steps: int, lost_seconds: float) -> None:
    die_with_parent()
    with session(report=partial(report, run_dir), lost_seconds=lost_seconds) as world:
        train(world, run_dir, steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
