"""The jobs of a sweep as processes of this machine, one after another or several at once."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sftdist.core.agent import PREEMPTED
from sftdist.core.children import Children
from sftdist.core.distributed import PARENT_VARIABLE, STOP_SIGNALS
from sftdist.core.errors import ConfigError
from sftdist.core.processes import usable_cores
from sftdist.core.sweep import Job, Outcome, Sweep, SweepStopped, ended, last_words, start_of, unfinished
from sftdist.core.sweep_share import VISIBLE, deal, devices_here, threads

_LOOK_SECONDS = 0.1
INTERRUPTED = 130  # a command that Ctrl-C has ended
_ABOVE = "its message is above, where the job ran"


@dataclass(frozen=True)
class _Running:
    job: Job
    place: int
    before: str | None
    child: subprocess.Popen[bytes]


def run_jobs(sweep: Sweep, jobs: Sequence[Job], parallel: int) -> None:
    """Run each job as `sftdist COMMAND WORDS`, `parallel` at a time, and note what becomes of it.

    Those that are finished are not started. A stop signal is passed on to those that run; then SweepStopped is raised.
    Raises ConfigError where the machine has too few devices for `parallel` jobs, or a job needs several hosts.
    """
    parallel = min(parallel, len(jobs))  # else devices would lie idle
    _refuse_several_hosts(jobs)
    places = deal(devices_here(), parallel, [job.cfg.launch.nproc for job in jobs])
    todo, running = deque(unfinished(sweep, jobs)), dict[int, _Running]()
    with Children() as children:
        seen = children.seen
        while running or (todo and not seen):
            for place, variables in enumerate(places):
                if todo and not seen and place not in running:
                    running[place] = _start(sweep, todo.popleft(), place, variables, parallel, children)
            for done in [item for item in running.values() if item.child.poll() is not None]:
                _note(sweep, running.pop(done.place), parallel, stopped=bool(seen))
            time.sleep(_LOOK_SECONDS)
    if seen:
        raise SweepStopped("the sweep was stopped")


def _refuse_several_hosts(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.cfg.launch.nodes > 1:
            raise ConfigError(
                f"launch.nodes: given {job.cfg.launch.nodes} in a sweep, required 1, since its jobs start on this host "
                "only; for several hosts use hydra/launcher=slurm 'hydra.launcher.options=[\"--nodes=2\"]'"
            )


def _start(
    sweep: Sweep, job: Job, place: int, variables: Mapping[str, str], parallel: int, children: Children
) -> _Running:
    screen = sweep.screen(job) if parallel > 1 else None
    where = "" if screen is None else f"; its screen is {screen}"
    sweep.say(job, f"sftdist {sweep.command} {sweep.shown(job)}{where}")
    command = [*sweep.program, sweep.command, *job.words]
    environment = {**_cores(job, variables, parallel), **os.environ, **variables, PARENT_VARIABLE: str(os.getpid())}
    before = start_of(job)
    sweep.note(job, Outcome("running", log=None if screen is None else str(screen)))
    if screen is None:
        child = children.start(command, environment)
    else:
        screen.parent.mkdir(parents=True, exist_ok=True)
        with screen.open("ab") as file:
            child = children.start(command, environment, file)
    return _Running(job, place, before, child)


def _cores(job: Job, variables: Mapping[str, str], parallel: int) -> dict[str, str]:
    """Without it each job would take all cores for itself."""
    if parallel == 1:
        return {}
    devices = variables.get(VISIBLE, "").split(",")
    return {"OMP_NUM_THREADS": str(threads(usable_cores(), parallel, job.cfg.launch.nproc or len(devices)))}


def _note(sweep: Sweep, done: _Running, parallel: int, *, stopped: bool) -> None:
    job, code = done.job, done.child.returncode
    outcome = ended(job, code if code >= 0 else 128 - code, done.before)
    if stopped and (-code in STOP_SIGNALS or code == INTERRUPTED):  # it had not yet taken the signal over
        outcome = Outcome("preempted", PREEMPTED)
    if outcome.state == "failed" and not outcome.reason:
        outcome = replace(outcome, reason=last_words(sweep.screen(job)) if parallel > 1 else _ABOVE)
    if parallel > 1:
        outcome = replace(outcome, log=str(sweep.screen(job)))
    sweep.note(job, outcome)
    sweep.say(job, outcome.said())
