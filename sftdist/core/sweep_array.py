"""The jobs of a sweep as one SLURM job array: submitting it, waiting for it, and finding it again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import FrameType

from sftdist.core.agent import FAILED, read_status
from sftdist.core.distributed import STOP_SIGNALS
from sftdist.core.errors import ConfigError, StartupError
from sftdist.core.shipped import shipped_folder
from sftdist.core.sweep import (
    Job,
    Outcome,
    Sweep,
    SweepStopped,
    ended_run,
    last_words,
    start_of,
    unfinished,
)

PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_ANY = ""  # no start is called so
GONE_AFTER = 2  # looks in a row at a queue that does not list a task: a requeue is not its end


@dataclass(frozen=True)
class ArraySettings:
    """`options`: further words for sbatch; `parallel`: tasks at once, None for as many as the cluster lets run; `wait`:
    until all have ended, looking every `poll_seconds`."""

    options: tuple[str, ...] = ()
    parallel: int | None = None
    wait: bool = True
    poll_seconds: float = 10.0


def run_array(sweep: Sweep, jobs: Sequence[Job], settings: ArraySettings) -> None:
    """Run the jobs as tasks of one job array and note what becomes of them.

    Those that are finished are not submitted, and those that an earlier start has submitted, and that SLURM still
    knows, are waited for. A stop signal ends the waiting (SweepStopped), not the array. Raises ConfigError where a job
    cannot be a task, and StartupError where SLURM refuses the array.
    """
    _refuse(sweep, jobs, settings)
    queue = read_queue()
    if queue is None:
        raise StartupError("hydra/launcher=slurm: squeue does not answer; its message is above")
    todo = unfinished(sweep, jobs)
    before: dict[int, str | None] = {job.number: start_of(job) for job in todo}
    waiting = {job.number: array for job in todo if (array := _array_before(sweep, job, queue)) is not None}
    for number, array in waiting.items():
        before[number] = _ANY  # the task may have begun
        sweep.say(sweep.jobs[number], f"{sweep.shown(sweep.jobs[number])}: in job array {array}, which goes on")
    if new := [job for job in todo if job.number not in waiting]:
        sweep.screen(new[0]).parent.mkdir(exist_ok=True)  # sbatch makes no folder
        with _signals_held():  # an array whose number is not written down would be submitted again
            array = submit(sbatch_line(sweep.folder, [job.number for job in new], settings))
            waiting |= {job.number: array for job in new}
            sweep.note_all({job.number: Outcome("queued", array=array) for job in new})
        numbers = ranges(job.number for job in new)
        print(f"submitted job array {array} with jobs {numbers}; screens are in {sweep.folder}/screens", flush=True)
    sweep.note_all({number: Outcome("queued", array=array) for number, array in waiting.items()})
    if settings.wait:
        with _left_alone(sorted(set(waiting.values()))):
            _wait(sweep, waiting, before, settings.poll_seconds)


def sbatch_line(folder: Path, numbers: Sequence[int], settings: ArraySettings) -> list[str]:
    """The command that submits the jobs of these numbers; the user's own options win over ours."""
    limit = f"%{settings.parallel}" if settings.parallel else ""
    screens = f"--output={folder.absolute()}/screens/%5a.log"
    ours = [f"--array={ranges(numbers)}{limit}", f"--job-name={folder.name}", screens]
    return [
        "sbatch",
        "--parsable",
        *ours,
        *settings.options,
        str(shipped_folder("slurm") / "sweep.sbatch"),
        str(folder.absolute()),
    ]


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,7`: numbers as sbatch takes them."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    ends = [(run[0][1], run[-1][1]) for run in runs]
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ends)


def parse_queue(text: str) -> dict[str, str]:
    """`squeue --array --format='%i %T'`: the state of each task, such as `{"12_3": "RUNNING"}`."""
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())


def read_queue() -> dict[str, str] | None:
    """What SLURM knows of this user's tasks that are not over; None where it does not answer, which is printed."""
    done = _slurm(["squeue", "--me", "--noheader", "--array", "--format=%i %T"])
    if done.returncode:
        print(f"squeue: {done.stderr.strip()}", flush=True)
        return None
    return parse_queue(done.stdout)


def submit(line: Sequence[str]) -> str:
    """The number of the array. Raises StartupError with the words of sbatch."""
    done = _slurm(line, outside_of_a_job(os.environ))
    if done.returncode:
        raise StartupError(f"sbatch refuses the job array: {done.stderr.strip()} (hydra.launcher.options)")
    return done.stdout.strip().partition(";")[0]  # ID, or ID;CLUSTER


def outside_of_a_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what SLURM says of the job, or the interactive allocation, that this process runs in: the tasks would
    take its GPUs and CPUs for their own."""
    return {key: value for key, value in environment.items() if key == "SLURM_CONF" or not key.startswith("SLURM_")}


def _slurm(line: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"hydra/launcher=slurm: {line[0]} is not on the PATH; start the sweep on a host that submits jobs, or use "
            "hydra/launcher=torchrun"
        ) from error


def _refuse(sweep: Sweep, jobs: Sequence[Job], settings: ArraySettings) -> None:
    if sweep.command != "train":
        raise ConfigError(
            f"hydra/launcher=slurm: given sftdist {sweep.command}, required train; use hydra/launcher=torchrun"
        )
    if settings.parallel is not None and settings.parallel < 1:
        raise ConfigError(f"hydra.launcher.parallel: given {settings.parallel}, required at least 1")
    for job in jobs:
        if job.run_dir is None:
            raise ConfigError("dry_run: nothing is trained, so no cluster is needed; use hydra/launcher=torchrun")
        if job.cfg.launch.nodes > 1:
            raise ConfigError(
                f"launch.nodes: given {job.cfg.launch.nodes}, but SLURM says it to each task; "
                f"write 'hydra.launcher.options=[\"--nodes={job.cfg.launch.nodes}\"]' instead"
            )


def _array_before(sweep: Sweep, job: Job, queue: Mapping[str, str]) -> str | None:
    """The array that an earlier start has submitted, where the job is still in the queue. Raises ConfigError where what
    is queued there under the job's number is another job."""
    earlier = sweep.array_before(job)
    if earlier is None or f"{earlier[0]}_{job.number}" not in queue:
        return None
    if not earlier[1]:
        raise ConfigError(
            f"{sweep.folder}: job array {earlier[0]} still runs other jobs of this sweep; wait for it, or end it with "
            f"scancel {earlier[0]}"
        )
    return earlier[0]


def _wait(sweep: Sweep, waiting: dict[int, str], before: Mapping[int, str | None], poll_seconds: float) -> None:
    """Until no task is in the queue any more."""
    missed = dict.fromkeys(waiting, 0)
    while missed:
        queue = read_queue()
        for number in list(missed) if queue is not None else ():
            job, state = sweep.jobs[number], (queue or {}).get(f"{waiting[number]}_{number}")
            missed[number] = missed[number] + 1 if state is None else 0
            if state is not None:
                outcome = Outcome("queued" if state in PENDING else "running", array=waiting[number])
            elif missed[number] >= GONE_AFTER:
                outcome = replace(ended_task(job, before[number], sweep.screen(job)), array=waiting[number])
                missed.pop(number)
            else:
                continue
            if outcome != sweep.outcomes[number]:
                sweep.note(job, outcome)
                sweep.say(job, outcome.said())
        if missed:
            time.sleep(poll_seconds)


def ended_task(job: Job, before: str | None, screen: Path) -> Outcome:
    """What a task that has left the queue has left. `before`: `start_of` the job before the array was submitted."""
    status = read_status(job.run_dir) if job.run_dir is not None else None
    if status is not None and status["start"] != before:
        return replace(ended_run(job, status), log=str(screen))
    words = last_words(screen) if screen.is_file() else ""
    return Outcome(
        "failed", FAILED, reason=words or "the task ended, or was cancelled, before it said anything", log=str(screen)
    )


@contextmanager
def _signals_held() -> Iterator[None]:
    """A stop signal waits for the end of the block, in the commands that it starts, too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _left_alone(arrays: Sequence[str]) -> Iterator[None]:
    """A stop signal ends the waiting at once; the cluster goes on with what it has."""

    def leave(number: int, frame: FrameType | None) -> None:
        names = " ".join(arrays)
        raise SweepStopped(
            f"no longer waiting; job array {names} goes on. The same command finds it again, scancel {names} ends it."
        )

    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
