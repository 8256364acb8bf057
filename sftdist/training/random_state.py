"""The random state of every rank, as tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sftdist.core.distributed import World

RandomState = Mapping[str, bytes]  # by kind of device


def random_state(device: torch.device) -> RandomState:
    """This rank's, as it is now."""
    state = {"cpu": torch.get_rng_state().numpy().tobytes()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return state


def random_tensors(states: Sequence[RandomState]) -> dict[str, Tensor]:
    """Those of all ranks, in order of rank, under the names of their file."""
    return {
        f"{kind}/{rank:05d}": torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for rank, state in enumerate(states)
        for kind, data in state.items()
    }


def restore_random_state(path: Path, world: World, step: int, same_ranks: bool) -> None:
    """Each rank's own from the file; on another number of ranks, one that follows from step and rank."""
    if not same_ranks:
        torch.manual_seed(step * 1_000_003 + world.rank)
        return
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor(f"cpu/{world.rank:05d}"))
        if world.device.type == "cuda" and f"cuda/{world.rank:05d}" in file.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(file.get_tensor(f"cuda/{world.rank:05d}"), world.device)
