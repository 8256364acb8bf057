"""A sweep: its jobs, what becomes of each of them, and the folder that remembers both."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
PROGRAM = (sys.executable, "-m", "sftdist.cli")


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

    def said(self) -> str:
        """In a line."""
        code = "" if self.code is None else f", exit code {self.code}"
        reason = f": {self.reason.partition(chr(10))[0]}" if self.reason else ""
        return f"{self.state}{code}{reason}"


def sweep_name(command: str, words: Sequence[str]) -> str:
    """The same for the same words, so that a second start finds the sweep again."""
    return f"sweep-{sha256_json([command, *words])[:8]}"


def shared_run(jobs: Iterable[Job], job: Job) -> str | None:
    """The issue where another job has this one's run directory, else None."""
    for other in jobs:
        if job.run_dir is not None and other.run_dir == job.run_dir and other.number != job.number:
            return (
                f"jobs {other.number} and {job.number} have one run directory, {job.run_dir}: {_why_shared(other, job)}"
            )
    return None


def _why_shared(one: Job, other: Job) -> str:
    if snapshot.config_hash(one.cfg) == snapshot.config_hash(other.cfg):
        return (
            "they differ in nothing that names a run; leave out what is given twice, or name them by what differs, for "
            "instance 'run.name=NAME-${zero.stage}'"
        )
    return (
        "run.dir or run.name is given once for all of them; leave it out (hydra.sweep.dir=DIR puts all run directories "
        "below DIR)"
    )


class Sweep:
    """The jobs of a sweep by number, in `folder`: `sweep.json` follows every change, `jobs/NNNNN` holds the final words
    of a job, each ended by a NUL, `screens/NNNNN.log` what a job prints where several run at once.

    `make(number, overrides)` composes a job; `fixed` are the keys that are the same in all of them. A job is
    `PROGRAM COMMAND WORDS`.
    """

    def __init__(
        self,
        command: str,
        folder: Path,
        make: Callable[[int, tuple[str, ...]], Job],
        fixed: Collection[str] = (),
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self.command, self.folder, self.program = command, folder, tuple(program)
        self.jobs: dict[int, Job] = {}
        self.outcomes: dict[int, Outcome] = {}
        self._make, self._fixed = make, frozenset(fixed)
        self._before: dict[int, dict[str, Any]] = {}

    def recall(self) -> None:
        """Read what an earlier start has left. For the one process that holds the folder."""
        file = self.folder / FILE
        self._before = {entry["number"]: entry for entry in read_json(file)["jobs"]} if file.is_file() else {}

    def job(self, number: int, overrides: Sequence[str]) -> Job:
        """The job with these overrides, composed and taken in where it is new. Raises ConfigError where it cannot be
        composed."""
        words = tuple(overrides)
        known = self.jobs.get(number)
        if known is not None and known.overrides == words:
            return known
        self.jobs[number] = job = self._make(number, words)
        return job

    def words_file(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.number:05}"

    def screen(self, job: Job) -> Path:
        return self.folder / "screens" / f"{job.number:05}.log"

    def shown(self, job: Job) -> str:
        """The overrides that are not the same in all jobs."""
        return " ".join(word for word in job.overrides if word.partition("=")[0] not in self._fixed)

    def begin(self, jobs: Iterable[Job]) -> None:
        """Write down the words of jobs that are about to run, and the configuration that was checked: a preset that is
        edited before a job starts, which may be days later on a cluster, is refused there. Raises ConfigError where one
        has the run directory of a job with other overrides."""
        for job in jobs:
            if issue := shared_run((other for other in self.jobs.values() if other.overrides != job.overrides), job):
                raise ConfigError(issue)
            self.words_file(job).parent.mkdir(parents=True, exist_ok=True)
            write_text(self.words_file(job), "".join(f"{word}\0" for word in job.words))
            if job.run_dir is not None and not (job.run_dir / snapshot.FILE).is_file():
                snapshot.write_config(job.run_dir, snapshot.of_run(job.cfg))
            earlier = self.array_before(job)
            self.outcomes[job.number] = Outcome(array=earlier[0] if earlier and earlier[1] else None)
        self._write()

    def note(self, job: Job, outcome: Outcome) -> None:
        """Write down where a job stands."""
        self.note_all({job.number: outcome})

    def note_all(self, outcomes: Mapping[int, Outcome]) -> None:
        """Write down where jobs stand, at once."""
        self.outcomes |= outcomes
        self._write()

    def say(self, job: Job, text: str) -> None:
        """A line about a job on the screen."""
        print(f"job {job.number}: {text}", flush=True)

    def array_before(self, job: Job) -> tuple[str, bool] | None:
        """The SLURM job array to which an earlier start of the sweep gave the job of this number, and whether that job
        had the same overrides; None where there is none."""
        entry = self._before.get(job.number)
        if entry is None or entry["array"] is None:
            return None
        return entry["array"], entry["overrides"] == list(job.overrides)

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

    def _write(self) -> None:
        write_json(self.folder / FILE, {"command": self.command, "jobs": [self._entry(job) for job in self._noted()]})

    def _entry(self, job: Job) -> dict[str, Any]:
        run_dir = None if job.run_dir is None else str(job.run_dir)
        start = {"number": job.number, "overrides": list(job.overrides), "run_dir": run_dir}
        return start | asdict(self.outcomes[job.number])

    def _row(self, job: Job, outcome: Outcome) -> tuple[str, ...]:
        code, step = ("" if number is None else str(number) for number in (outcome.code, outcome.step))
        metric = "" if outcome.metric is None else f"{outcome.metric:.6g}"
        return (str(job.number), self.shown(job), outcome.state, code, step, metric, str(job.run_dir or ""))

    def _failure(self, job: Job, outcome: Outcome) -> list[str]:
        command = shlex.join(("sftdist", self.command, *job.overrides))
        lines = [f"job {job.number} failed with exit code {outcome.code}: {command}"]
        lines += [f"  {line}" for line in outcome.reason.splitlines()]
        return [*lines, f"  log: {outcome.log}"] if outcome.log else lines


def unfinished(sweep: Sweep, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are still to run; those that an earlier start has finished are noted."""
    done = {job.number: outcome for job in jobs if (outcome := finished(job)) is not None}
    sweep.note_all(done)
    for number in done:
        job = sweep.jobs[number]
        sweep.say(job, f"{sweep.shown(job)}: finished before, in {job.run_dir}")
    return [job for job in jobs if job.number not in done]


def finished(job: Job) -> Outcome | None:
    """How a run has ended that is done already, with the same configuration; else None."""
    if job.run_dir is None or not (job.run_dir / snapshot.FILE).is_file():
        return None
    status = read_status(job.run_dir)
    if status is None or status["state"] != "done":
        return None
    try:
        before = snapshot.read_config(job.run_dir)
    except ConfigError:
        return None  # the job itself says what is wrong, and the others go on
    return None if snapshot.differences(before, job.cfg) else ended_run(job, status)


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
        outcome = ended_run(job, status)
        return replace(outcome, code=code) if status["state"] == "running" else outcome
    if code == PREEMPTED:
        return Outcome("preempted", code)
    return Outcome("failed" if code else "done", code)


def last_words(screen: Path) -> str:
    """The end of what a job has printed."""
    return "\n".join(screen.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])


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
