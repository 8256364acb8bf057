"""The keys of `hydra.launcher`. In a file that Hydra's scanner leaves alone: it runs a module before Python knows it by
name, and a dataclass with postponed annotations needs that name."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TorchrunSettings:
    _target_: str = "hydra_plugins.sftdist_launchers.torchrun.TorchrunLauncher"
    parallel: int = 1  # jobs at once


@dataclass
class SlurmSettings:
    _target_: str = "hydra_plugins.sftdist_launchers.slurm.SlurmLauncher"
    parallel: int | None = None  # tasks of the array at once; default: as many as the cluster lets run
    options: list[str] = field(default_factory=list)  # further words for sbatch, such as --partition=gpu
    wait: bool = True  # until the array has ended
    poll_seconds: float = 10.0  # how often the queue is looked at
