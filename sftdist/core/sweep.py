"""A sweep: its jobs, what becomes of each of them, and the folder that remembers both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sftdist.core import snapshot
from sftdist.core.agent import DONE, FAILED, PREEMPTED, read_status
from sftdist.core.errors import ConfigError, SftdistError
from sftdist.core.figures import METRICS, last_figures
from sftdist.core.settings import TrainConfig
from sftdist.core.storage import read_json, sha256_json, write_json, write_text
from sftdist.core.table import columns

FILE = "sweep.json"
DEFAULT_METRIC = "eval/loss"


class SweepStopped(SftdistError):
    """A signal has ended the sweep; what it had started has been stopped, too."""

    exit_code = PREEMPTED
    reported = True


@dataclass(frozen=True)
class Job:
    """One job: `overrides` as the sweeper made them, `words` what its command is given, `run_dir` where it runs (None
    for a command that makes no run)."""

    number: int
    overrides: tuple[str, ...]
    words: tuple[str, ...]
    run_dir: Path | None
    cfg: TrainConfig = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """Where a job stands: `state` is waiting, queued, running, done, failed or preempted; `log`: where to read on;
    `array`: the SLURM job array that it is a task of."""

    state: str = "waiting"
    code: int | None = None
    step: int | None = None
    metric: float | None = None
    reason: str = ""
    log: str | None = None
    array: str | None = None


def sweep_name(command: str, words: Sequence[str]) -> str:
    """The same for the same words, so that a second start finds the sweep again."""
    return f"sweep-{sha256_json([command, *words])[:8]}"


def shared_run(jobs: Iterable[Job], job: Job) -> str | None:
    """The issue where another job has this one's run directory, else None."""
    for other in jobs:
        if job.run_dir is not None and other.run_dir == job.run_dir:
            return (
                f"jobs {other.number} and {job.number} have one run directory, {job.run_dir}: they differ in nothing "
                "that names a run; name them by what differs, for instance 'run.name=NAME-${zero.stage}'"
            )
    return None


class Sweep:
    """The jobs of a sweep by number, in `folder`: `sweep.json` follows every change, `jobs/NNNNN` holds the final words
    of a job, each ended by a NUL, `screens/NNNNN.log` what a job prints where several run at once.

    `make(number, overrides)` composes a job; `fixed` are the keys that are the same in all of them.
    """

    def __init__(
        self, command: str, folder: Path, make: Callable[[int, tuple[str, ...]], Job], fixed: Collection[str] = ()
    ) -> None:
        self.command, self.folder = command, folder
        self.jobs: dict[int, Job] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._make, self._fixed = make, frozenset(fixed)

    def job(self, number: int, overrides: Sequence[str]) -> Job:
        """The job with these overrides, composed and taken in where it is new. Raises ConfigError where it cannot be
        composed, and where another job, one with other overrides, has its run directory."""
        words = tuple(overrides)
        known = self.jobs.get(number)
        if known is not None and known.overrides == words:
            return known
        job = self._make(number, words)
        if issue := shared_run((other for other in self.jobs.values() if other.overrides != words), job):
            raise ConfigError(issue)
        self.jobs[number] = job
        return job

    def words_file(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.number:05}"

    def screen(self, job: Job) -> Path:
        return self.folder / "screens" / f"{job.number:05}.log"

    def shown(self, job: Job) -> str:
        """The overrides that are not the same in all jobs."""
        return " ".join(word for word in job.overrides if word.partition("=")[0] not in self._fixed)

    def note(self, job: Job, outcome: Outcome) -> None:
        """Write down where a job stands."""
        if job.number not in self.outcomes:
            self.words_file(job).parent.mkdir(parents=True, exist_ok=True)
            write_text(self.words_file(job), "".join(f"{word}\0" for word in job.words))
        self.outcomes[job.number] = outcome
        write_json(self.folder / FILE, {"command": self.command, "jobs": [self._entry(job) for job in self._noted()]})

    def earlier(self) -> dict[int, dict[str, Any]]:
        """What `sweep.json` says, by job."""
        path = self.folder / FILE
        return {entry["number"]: entry for entry in read_json(path)["jobs"]} if path.is_file() else {}

    def table(self) -> list[str]:
        """A line per job, and below it what the failed ones failed of."""
        metrics = {job.cfg.sweep.metric or DEFAULT_METRIC for job in self.jobs.values()}
        metric = metrics.pop() if len(metrics) == 1 else "metric"
        head: tuple[str, ...] = ("job", "overrides", "state", "code", "step", metric, "run")
        rows = [head, *(self._row(job, self.outcomes[job.number]) for job in self._noted())]
        lines = [line.rstrip() for line in columns(rows)]
        failed = [job for job in self._noted() if self.outcomes[job.number].state == "failed"]
        return lines + [line for job in failed for line in self._failure(job, self.outcomes[job.number])]

    def code(self) -> int:
        """0 where all is well, else the exit code of the first job that failed."""
        codes = [self.outcomes[job.number].code for job in self._noted()]
        return next((code for code in codes if code), DONE)

    def _noted(self) -> list[Job]:
        return [self.jobs[number] for number in sorted(self.outcomes)]

    def _entry(self, job: Job) -> dict[str, Any]:
        run_dir = None if job.run_dir is None else str(job.run_dir)
        start = {"number": job.number, "overrides": list(job.overrides), "run_dir": run_dir}
        return start | asdict(self.outcomes[job.number])

    def _row(self, job: Job, outcome: Outcome) -> tuple[str, ...]:
        code, step = ("" if number is None else str(number) for number in (outcome.code, outcome.step))
        metric = "" if outcome.metric is None else f"{outcome.metric:.6g}"
        return (str(job.number), self.shown(job), outcome.state, code, step, metric, str(job.run_dir or ""))

    def _failure(self, job: Job, outcome: Outcome) -> list[str]:
        lines = [f"job {job.number} failed with exit code {outcome.code}: sftdist {self.command} {self.shown(job)}"]
        lines += [f"  {line}" for line in outcome.reason.splitlines()]
        return [*lines, f"  log: {outcome.log}"] if outcome.log else lines


def finished(job: Job) -> Outcome | None:
    """How a run has ended that is done already, with the same configuration; else None."""
    if job.run_dir is None or not (job.run_dir / snapshot.FILE).is_file():
        return None
    status = read_status(job.run_dir)
    if status is None or status["state"] != "done":
        return None
    if snapshot.differences(snapshot.read_config(job.run_dir), job.cfg):
        return None
    return ended_run(job, status)


def start_of(job: Job) -> str | None:
    """Which start has written the run's status, to tell a later one from it."""
    status = None if job.run_dir is None else read_status(job.run_dir)
    return None if status is None else str(status["start"])


def ended(job: Job, code: int, before: str | None) -> Outcome:
    """What a command that ended with `code` has left. `before`: `start_of` the job before the command began, since a
    status of an earlier start says nothing about this one."""
    status = None if job.run_dir is None else read_status(job.run_dir)
    if status is not None and status["state"] == "done" and code == DONE:
        return ended_run(job, status)
    if status is not None and status["state"] != "done" and start_of(job) != before:
        return ended_run(job, status)
    if code == PREEMPTED:
        return Outcome("preempted", code)
    return Outcome("failed" if code else "done", code)


def ended_run(job: Job, status: dict[str, Any]) -> Outcome:
    """What a run has left whose status is final: its metric, or the reason why there is none."""
    state, code, step = str(status["state"]), int(status["code"]), status["step"]
    log = str(job.run_dir / "log") if job.run_dir is not None else None
    if state == "running":
        return Outcome("failed", FAILED, step, reason=f"it ended without a word ({status['reason']})", log=log)
    if state != "done":
        return Outcome(state, code, step, reason=str(status["reason"]), log=log)
    figures = last_figures(job.run_dir) if job.run_dir is not None else {}
    wanted = job.cfg.sweep.metric
    if wanted is not None and wanted not in figures:
        there = ", ".join(sorted(figures)) or "none"
        reason = f"sweep.metric: given {wanted}, which {METRICS} does not have; its numbers are {there}"
        return Outcome("failed", FAILED, step, reason=reason, log=str(job.run_dir / METRICS) if job.run_dir else None)
    return Outcome("done", DONE, step, figures.get(wanted or DEFAULT_METRIC))
