"""What the two launchers share: from the overrides that a sweeper has made to jobs, and back to what it reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sftdist.core.errors import ConfigError
from sftdist.core.sweep import Job, Sweep


class JobLauncher(Launcher):
    """A launcher whose jobs are whole `sftdist` commands. Only `sftdist COMMAND -m` can use it."""

    sweep: Sweep
    sweeper: str

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if not isinstance(task_function, Sweep):
            raise ConfigError("hydra/launcher: this one starts sftdist's own jobs; use it with sftdist COMMAND -m")
        self.sweep, self.sweeper = task_function, config.hydra.runtime.choices["hydra/sweeper"]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs; each returns its metric, and None where it has none.

        A failed one is no exception here: Hydra's sweepers would give the others up. The table names it. Raises
        ConfigError where a sampler has proposed what cannot be composed.
        """
        jobs = [self._job(initial_job_idx + at, overrides) for at, overrides in enumerate(job_overrides)]
        self.sweep.begin(jobs)
        # A sampler may propose the same thing twice at once: that is one run.
        first = {job.overrides: job for job in reversed(jobs)}
        self.run(sorted(first.values(), key=lambda job: job.number))
        for job in jobs:
            self.sweep.note(job, self.sweep.outcomes[first[job.overrides].number])
        if self.sweeper != "basic":
            self._require_metric(jobs)
        metrics = [self.sweep.outcomes[job.number].metric for job in jobs]
        return [
            JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=metric)
            for job, metric in zip(jobs, metrics, strict=True)
        ]

    def _job(self, number: int, overrides: Sequence[str]) -> Job:
        try:
            return self.sweep.job(number, overrides)
        except ConfigError as error:
            raise ConfigError([f"job {number} ({' '.join(overrides)}): {issue}" for issue in error.issues]) from error

    def _require_metric(self, jobs: Sequence[Job]) -> None:
        """A search that is not told how its trials did would go on to the end for nothing."""
        for job in jobs:
            outcome = self.sweep.outcomes[job.number]
            if outcome.state == "done" and outcome.metric is None:
                raise ConfigError(
                    f"hydra/sweeper={self.sweeper}: job {job.number} has ended without a metric, for nothing was "
                    "evaluated; set eval.every_steps, or sweep.metric to another key of metrics.jsonl, such as loss"
                )

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs and note what becomes of them."""
