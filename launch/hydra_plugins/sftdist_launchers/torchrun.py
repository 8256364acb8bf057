"""`hydra/launcher=torchrun`: the jobs of a sweep on this machine, each with torchrun's agent and a port of its own."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.sftdist_launchers._jobs import JobLauncher
from hydra_plugins.sftdist_launchers._settings import TorchrunSettings
from omegaconf import DictConfig

from sftdist.core.errors import ConfigError
from sftdist.core.sweep import Job
from sftdist.core.sweep_processes import run_jobs

ConfigStore.instance().store(group="hydra/launcher", name="torchrun", node=TorchrunSettings, provider="sftdist")


class TorchrunLauncher(JobLauncher):
    """`parallel`: how many jobs run at once; the GPUs and cores are shared out between them."""

    def __init__(self, parallel: int) -> None:
        self.parallel = parallel

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if self.parallel < 1:
            raise ConfigError(f"hydra.launcher.parallel: given {self.parallel}, required at least 1")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def run(self, jobs: Sequence[Job]) -> None:
        run_jobs(self.sweep, jobs, self.parallel)
