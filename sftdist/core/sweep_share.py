"""Dealing out the devices and cores of a machine to the jobs that run on it at the same time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from sftdist.core.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def devices_here(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, by number or name."""
    visible = environment.get(VISIBLE)
    if visible is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name for name in visible.split(",") if name.strip()] if torch.cuda.is_available() else []


def deal(devices: Sequence[str], parallel: int, ranks: Sequence[int | None]) -> list[dict[str, str]]:
    """The variables of each of `parallel` places, with an equal part of the devices; what is over stays idle.

    `ranks`: those that each job asks for. Raises ConfigError where a place has fewer devices than a job needs.
    """
    if parallel == 1 or not devices:
        return [{} for _ in range(parallel)]
    each = len(devices) // parallel
    if not each:
        raise ConfigError(
            f"hydra.launcher.parallel: given {parallel}, required at most one job per GPU, and there are "
            f"{len(devices)}; set parallel={len(devices)}"
        )
    if (most := max((count or 1 for count in ranks), default=1)) > each:
        raise ConfigError(
            f"hydra.launcher.parallel: given {parallel}, which leaves {each} of {len(devices)} GPUs to each job, but "
            f"launch.nproc={most} needs {most}; set parallel={max(1, len(devices) // most)}, or lower launch.nproc"
        )
    return [{VISIBLE: ",".join(devices[place * each : (place + 1) * each])} for place in range(parallel)]


def threads(cores: int, parallel: int, ranks: int) -> int:
    """Cores for each rank of one of `parallel` jobs, at least one."""
    return max(1, cores // (parallel * ranks))
