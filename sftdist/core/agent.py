"""torchrun's agent, started with the signals and the shutdown grace that a save needs, and the file that carries
the exit code: torchrun itself turns every failing child into exit 1.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from sftdist.core.distributed import PARENT_VARIABLE, STOP_SIGNALS, die_with_parent, restart_count, stops_at_once
from sftdist.core.storage import read_json, write_json

DONE, FAILED, BAD_CONFIG, BAD_DATA, GATE, PREEMPTED = 0, 1, 2, 3, 4, 75
STATUS = "status.json"
START_VARIABLE = "SFTDIST_START"  # names one start of the agent: its status is told from another's
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")


def write_status(
    run_dir: Path,
    state: str,
    code: int,
    reason: str = "",
    step: int | None = None,
    rank: int | None = None,
    *,
    retry: bool = True,
) -> None:
    """Replace `run_dir/status.json`. `state`: running, done, failed or preempted; `code`: the exit code.

    `retry=False` marks a failure that a restart would only meet again (a non-finite step).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    status = {"state": state, "code": code, "reason": reason, "step": step, "rank": rank, "retry": retry}
    status["start"] = os.environ.get(START_VARIABLE)
    write_json(run_dir / STATUS, status)


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The run's status, or None where none was written."""
    path = run_dir / STATUS
    return read_json(path) if path.is_file() else None


def restart_refused(run_dir: Path) -> dict[str, Any] | None:
    """The status that a worker group restarted by torchrun must not train over, else None.

    Bad configuration, bad data, a preemption and a failure marked `retry=False` would only happen again.
    """
    status = read_status(run_dir) if restart_count() else None
    final = status is not None and (status["code"] in (DONE, BAD_CONFIG, BAD_DATA, PREEMPTED) or not status["retry"])
    return status if final else None


def ranks_here(nproc: int | None) -> int:
    """Ranks to start on this host: `nproc`, else one per GPU, else one."""
    return nproc or torch.cuda.device_count() or 1


def idle_gpus(module: str, argv: Sequence[str]) -> str | None:
    """The command that uses every GPU of this host, where torchrun was told to start fewer ranks; else None."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks >= gpus:
        return None
    return f"torchrun --nproc-per-node {gpus} -m {module} {shlex.join(argv)}"


def launch(module: str, argv: Sequence[str], nproc: int, run_dir: Path, grace_seconds: float) -> int:
    """Run `python -m module argv` on `nproc` ranks under torchrun's agent; the exit code from `run_dir/status.json`.

    Stop signals are passed on once, so that a cluster that signals every process cannot cut a save short; a second
    Ctrl-C is passed on, too. The ranks have `grace_seconds` to save after a signal. The agent and the ranks die with
    this process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    start = uuid.uuid4().hex
    command = [
        *(sys.executable, "-m", "sftdist.core.agent", str(run_dir), "--standalone"),
        *("--nproc-per-node", str(nproc), "--signals-to-handle", FORWARDED),
        *("--shutdown-timeout", str(math.ceil(grace_seconds)), "-m", module, *argv),
    ]
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    own = {PARENT_VARIABLE: str(os.getpid()), START_VARIABLE: start}
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **own}
    # A session of its own: Ctrl-C in the terminal reaches this process only, which passes it on.
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    seen = _wait(child)
    return _exit_code(run_dir, start, child.returncode, stopped=bool(seen))


def _wait(child: subprocess.Popen[bytes]) -> Counter[int]:
    seen: Counter[int] = Counter()

    def forward(number: int, frame: FrameType | None) -> None:
        if not seen or stops_at_once(seen, number):
            child.send_signal(number)
        seen[number] += 1

    if threading.current_thread() is not threading.main_thread():
        child.wait()
        return seen
    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return seen


def _status_of(run_dir: Path, start: str | None) -> dict[str, Any] | None:
    """The status, where this start has written it: another run may hold the directory, or have left its own."""
    status = read_status(run_dir)
    return status if status is not None and status["start"] == start else None


def _exit_code(run_dir: Path, start: str | None, returned: int, *, stopped: bool) -> int:
    status = _status_of(run_dir, start)
    if status is not None and status["state"] != "running":
        return int(status["code"])
    if returned == 0:
        return DONE
    if stopped and status is None:
        if read_status(run_dir) is None:
            write_status(run_dir, "preempted", PREEMPTED, "stopped before training began; run again to start")
        return PREEMPTED
    if status is not None:
        reason = f"the ranks ended without a final status (torchrun's agent: {returned})"
        write_status(run_dir, "failed", FAILED, reason)
    return FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sftdist.core.agent RUN_DIR TORCHRUN-ARGUMENTS`: torchrun that says in one line what ended a rank."""
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    folder, *arguments = sys.argv[1:] if argv is None else argv
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    oom_kills = _oom_kills()
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except SignalException:
        return FAILED
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode != -9, item[1].timestamp))
        _report(Path(folder), rank, failure, out_of_memory=_oom_kills() > oom_kills)
        return FAILED
    return DONE


def _report(run_dir: Path, rank: int, failure: ProcessFailure, *, out_of_memory: bool) -> None:
    """Say what ended a rank that had no time to say so itself."""
    status = _status_of(run_dir, os.environ.get(START_VARIABLE))
    if status is not None and status["state"] != "running":
        return
    if failure.exitcode < 0:
        reason = f"rank {rank} (process {failure.pid}) was ended by {failure.signal_name()}"
    else:
        reason = f"rank {rank} (process {failure.pid}) ended with exit code {failure.exitcode}"
    if out_of_memory:
        reason += ": the host's memory ran out; use fewer ranks per host, or smaller packs (train.pack_tokens)"
    elif failure.exitcode == -signal.SIGKILL:
        reason += ": someone or the kernel killed it; look at the host's memory and at the scheduler's log"
    print(f"sftdist: error: {reason}; its last lines are above", file=sys.stderr, flush=True)
    if status is not None:  # without one this start never held the run directory
        write_status(run_dir, "failed", FAILED, reason, step=status["step"], rank=rank)


def _oom_kills() -> int:
    """How often the kernel has killed a process of this control group for memory (0 where it does not say)."""
    if not _CGROUP_EVENTS.is_file():
        return 0
    return sum(int(line.split()[1]) for line in _CGROUP_EVENTS.read_text().splitlines() if line.startswith("oom_kill "))


if __name__ == "__main__":
    sys.exit(main())
