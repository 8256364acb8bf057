"""`hydra/launcher=slurm`: the jobs of a sweep as one job array of a SLURM cluster."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.sftdist_launchers._jobs import JobLauncher
from hydra_plugins.sftdist_launchers._settings import SlurmSettings
from omegaconf import DictConfig

from sftdist.core.errors import ConfigError
from sftdist.core.sweep import Job
from sftdist.core.sweep_array import ArraySettings, run_array

ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmSettings, provider="sftdist")


class SlurmLauncher(JobLauncher):
    """`options`, `parallel`, `wait` and `poll_seconds`: see `ArraySettings`."""

    def __init__(self, options: Sequence[str], parallel: int | None, wait: bool, poll_seconds: float) -> None:
        self.settings = ArraySettings(tuple(options), parallel, wait, poll_seconds)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        sweeper = config.hydra.runtime.choices["hydra/sweeper"]
        if not self.settings.wait and sweeper != "basic":
            raise ConfigError(f"hydra.launcher.wait: given false, but hydra/sweeper={sweeper} needs every job's metric")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def run(self, jobs: Sequence[Job]) -> None:
        run_array(self.sweep, jobs, self.settings)
