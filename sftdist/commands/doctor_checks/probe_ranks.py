"""One of the two ranks of the doctor's collective test; started by torchrun's agent, as the ranks of training are."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sftdist.core.distributed import World, die_with_parent, session, share_text
from sftdist.core.errors import SftdistError
from sftdist.core.peers import PeerError
from sftdist.core.storage import write_json

RANKS = 2
START_SECONDS = 600.0  # for the imports of the other rank; who started both has less patience
COLLECTIVE_SECONDS = 10.0
_NUMBERS = 2**20


@dataclass
class Diary:
    """What this rank has done so far, on disk: one that hangs or dies leaves how far it came."""

    path: Path
    entries: dict[str, float | str] = field(default_factory=dict)

    def note(self, name: str, value: float | str) -> None:
        self.entries[name] = value
        write_json(self.path, self.entries)


def main() -> int:
    """`FOLDER`: each rank writes its diary there, as `rank-N.json`."""
    die_with_parent()
    diary = Diary(Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.json")
    diary.note("stage", "waiting for the other process to start")
    try:
        share_text("doctor", "start" if os.environ["RANK"] == "0" else None, START_SECONDS)
        diary.note("stage", "connecting the two processes")
        # Without a GPU for each rank both compute on the CPU; with None the session takes the GPUs.
        device = None if torch.cuda.device_count() >= RANKS else torch.device("cpu")
        with session(timeout_seconds=COLLECTIVE_SECONDS, device=device) as world:
            for backend, place in _backends(world).items():
                diary.note("stage", f"summing numbers over {backend}")
                diary.note(backend, _reduced(world, place))
    except PeerError:
        return 1
    except (RuntimeError, OSError, ValueError, SftdistError) as error:
        diary.note("error", str(error).strip() or type(error).__name__)
        return 1
    diary.note("stage", "done")
    return 0


def _backends(world: World) -> dict[str, torch.device]:
    both = {"gloo": torch.device("cpu"), "nccl": world.device}
    return both if world.device.type == "cuda" else {"gloo": world.device}


def _reduced(world: World, place: torch.device) -> float:
    """Seconds of an all_reduce of 4 MiB; RuntimeError where the sum is wrong."""
    numbers = torch.full((_NUMBERS,), world.rank + 1.0, device=place)
    started = time.perf_counter()
    total = world.all_reduce_sum(numbers)
    if not bool((total == sum(range(1, RANKS + 1))).all()):
        raise RuntimeError("the sum over the two processes is wrong")
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
