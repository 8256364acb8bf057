"""torchrun's agent, started with the signals and the shutdown grace that a save needs, and the file that carries
the exit code: torchrun itself turns every failing child into exit 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from sftdist.core.children import Children
from sftdist.core.distributed import (
    PARENT_VARIABLE,
    STOP_SIGNALS,
    die_with_parent,
    restart_count,
    started_again,
)
from sftdist.core.errors import SftdistError
from sftdist.core.failure import (
    ERROR,
    KILLED,
    Failure,
    headline,
    lines,
    print_failure,
    read_failure,
    where,
    write_failure,
)
from sftdist.core.meeting import meet, open_store
from sftdist.core.nodes import Nodes, rendezvous, require_port
from sftdist.core.oom import oom_kills
from sftdist.core.processes import usable_cores
from sftdist.core.ranklog import fresh_line, last_words, log_file, note, tell
from sftdist.core.relay import Others, Relay
from sftdist.core.start import OURS, START_VARIABLE, adopt_start, this_start
from sftdist.core.storage import read_json, write_json

DONE, FAILED, BAD_CONFIG, BAD_DATA, GATE, PREEMPTED = 0, 1, 2, 3, 4, 75
STATUS = "status.json"
WRITE_SECONDS = 3.0  # that a failure may take to its file before it is said elsewhere
TOLD_LAST = (ERROR, KILLED)  # these end all ranks within seconds
SETTLE_SECONDS = 5.0  # for the status to be written on another node and to be seen on this one
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


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

    While it is running, `code` is the one that applies if a signal ends it there: PREEMPTED where nothing would be
    lost, else FAILED. `retry=False` marks a failure that a restart would only meet again (a non-finite step).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    status = {"state": state, "code": code, "reason": reason, "step": step, "rank": rank, "retry": retry}
    status["start"] = this_start()
    write_json(run_dir / STATUS, status)


def report(run_dir: Path, failure: Failure) -> None:
    """For a rank: the first failure of all ranks in its file, as the run's status, and on the console. Where our own
    agent is about to end with it, that says it there: once, and behind what all the others still have to say."""
    errors: list[OSError] = []

    def write_down() -> None:
        try:
            write_failure(run_dir, failure)
            code, reason, step = failure.code, failure.message, failure.step
            write_status(run_dir, "failed", code, reason, step, rank=failure.rank, retry=failure.retry)
        except OSError as error:  # a full disk may be the very failure
            errors.append(error)

    writer = threading.Thread(target=write_down, name="failure", daemon=True)
    writer.start()
    writer.join(WRITE_SECONDS)  # the file system may have gone with the network
    last = restart_count() >= int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if OURS and last and failure.kind in TOLD_LAST and not (errors or writer.is_alive()):
        note("\n".join(lines(failure, run_dir)))
    else:
        print_failure(failure, run_dir)
    writer.join()
    if errors:
        tell(f"sftdist: {run_dir}: the failure could not be written down ({errors[0]})")


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The run's status, or None where none was written."""
    path = run_dir / STATUS
    return read_json(path) if path.is_file() else None


def restart_refused(run_dir: Path) -> dict[str, Any] | None:
    """The status that a worker group restarted by torchrun must not train over, else None.

    Bad configuration, bad data, a preemption and a failure marked `retry=False` would only happen again. What an
    earlier start left does not count: its preemption is no reason not to try again now.
    """
    status = _status_of(run_dir, this_start()) if started_again() else None
    if status is None or status["state"] == "running":
        return None
    final = status["code"] in (DONE, BAD_CONFIG, BAD_DATA, PREEMPTED) or not status["retry"]
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


@contextmanager
def stoppable() -> Iterator[None]:
    """TERM, USR1 and USR2 end this process with PREEMPTED, where nothing can be lost by it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(PREEMPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def launch(
    module: str,
    argv: Sequence[str],
    nproc: int,
    run_dir: Path,
    grace_seconds: float,
    max_restarts: int = 0,
    nodes: Nodes | None = None,
) -> int:
    """Run `python -m module argv` on `nproc` ranks under torchrun's agent; the exit code from `run_dir/status.json`.

    With `nodes` the agents of all nodes start one group of ranks together, and each of these calls returns the same
    code; a stop signal to one of them stops all. Raises ConfigError where this node is to host their meeting and the
    port is in use.

    Stop signals are passed on once, so that a cluster that signals every process cannot cut a save short; a second
    Ctrl-C is passed on, too, and ends the ranks at once. The ranks have `grace_seconds` to save after a signal; after
    a failure they are started again up to `max_restarts` times. The agent and the ranks die with this process.
    """
    if nodes is not None:
        require_port(nodes)
    run_dir.mkdir(parents=True, exist_ok=True)
    start, before = uuid.uuid4().hex, read_status(run_dir)
    command = [
        *(sys.executable, "-m", "sftdist.core.agent", str(run_dir), json.dumps(nodes and asdict(nodes))),
        *rendezvous(nodes, grace_seconds),
        *("--nproc-per-node", str(nproc), "--max-restarts", str(max_restarts), "--signals-to-handle", FORWARDED),
        *("--shutdown-timeout", str(math.ceil(grace_seconds)), "-m", module),
        *(word.replace("$", "$$") for word in argv),  # torchrun reads them as templates
    ]
    threads = str(max(1, usable_cores() // nproc))
    own = {PARENT_VARIABLE: str(os.getpid()), START_VARIABLE: start}
    # Where another node has gone, torch's C++ warns with its whole stack, behind the line that says what has happened.
    quiet = {} if nodes is None else {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = {"OMP_NUM_THREADS": threads, **quiet, **os.environ, **own}
    with Children(first=_say_stopping) as children:
        returned = children.start(command, environment).wait()
    if nodes is not None:
        if returned == BAD_CONFIG:
            return BAD_CONFIG
        start = _name_of_start(run_dir, before) or start
    return _exit_code(run_dir, start, returned, stopped=bool(children.seen))


def _say_stopping(number: int) -> None:
    again = "; a second one stops at once and saves nothing" * (number == signal.SIGINT)
    _say(f"sftdist: stopping after this step, with everything saved ({_SENT[number]}){again}")


_SENT = {int(number): "Ctrl-C" if number == signal.SIGINT else number.name for number in STOP_SIGNALS}


def _name_of_start(run_dir: Path, before: dict[str, Any] | None) -> str | None:
    """What the ranks called this start, where one of several nodes named it: the status is another than `before`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        status = read_status(run_dir)
        if status is not None and (before is None or status["start"] != before["start"]):
            if status["state"] != "running" or time.monotonic() > deadline:
                return str(status["start"])
        elif time.monotonic() > deadline:
            return None
        time.sleep(0.2)


def _status_of(run_dir: Path, start: str | None) -> dict[str, Any] | None:
    """The status, where this start has written it: another run may hold the directory, or have left its own."""
    status = read_status(run_dir)
    return status if status is not None and status["start"] == start else None


def _exit_code(run_dir: Path, start: str | None, returned: int, *, stopped: bool) -> int:
    status = _status_of(run_dir, start)
    if status is not None and status["state"] != "running":
        if returned < 0 and status["state"] == "failed":  # the agent was killed, and has not said it
            _say(f"sftdist: error: {status['reason']}")
        return int(status["code"])
    if returned == DONE:
        return DONE
    stopped = stopped or returned == PREEMPTED
    if stopped and (status is None or status["code"] == PREEMPTED):
        if status is not None or read_status(run_dir) is None:
            reason = "stopped where nothing could be lost; run the same command again to go on"
            write_status(run_dir, "preempted", PREEMPTED, reason)
        return PREEMPTED
    if status is not None:  # without one this start never held the run directory
        reason = _CUT if stopped else f"the ranks ended without a final status (torchrun's agent: {returned})"
        write_status(run_dir, "failed", FAILED, reason)
        _say(f"sftdist: error: {reason}")
    return FAILED


_CUT = (
    "the ranks were stopped before their save was complete, by a second Ctrl-C or after checkpoint.grace_seconds; the "
    "earlier checkpoints are untouched. Run the same command again to go on from the last one, with more grace if a "
    "save needs it."
)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m sftdist.core.agent RUN_DIR NODES TORCHRUN-ARGUMENTS`: torchrun whose last lines say what ended a rank.
    NODES: a `Nodes` as JSON, or null."""
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    folder, given, *arguments = sys.argv[1:] if argv is None else argv
    if "LOGLEVEL" not in os.environ:
        _silence_torchrun()
    options, nodes = torchrun.parse_args(arguments), json.loads(given)
    if nodes is None:
        return _run(Path(folder), options, Others())
    try:
        return _run_together(Path(folder), options, Nodes(**nodes))
    except SftdistError as error:
        _say(f"sftdist: error: {error}")
        return error.exit_code
    except SignalException:  # before there was a rank
        return PREEMPTED


def _silence_torchrun() -> None:
    """It tells of every signal and exit code; what a user needs of that, this agent says. Its loggers have levels of
    their own, which torch takes from LOGLEVEL."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _run_together(run_dir: Path, options: argparse.Namespace, nodes: Nodes) -> int:
    store = open_store(nodes)
    with Relay(store, nodes.count, serving=nodes.hosting) as relay:
        met = meet(store, nodes, _plan(run_dir, options, nodes), str(this_start()))
        adopt_start(met.start)
        options.local_addr = met.source
        if met.interface is not None:  # gloo would take the one that this host's name stands for, often the loopback
            os.environ.setdefault("GLOO_SOCKET_IFNAME", met.interface)
        code = _run(run_dir, options, relay)
        if code == FAILED:
            relay.fail()
        return code


def _plan(run_dir: Path, options: argparse.Namespace, nodes: Nodes) -> dict[str, str]:
    """What the nodes of one run have in common. Of the keys below `launch` some are a node's own."""
    words = [word for word in options.training_script_args if not word.lstrip("+").startswith("launch.")]
    return {
        "launch.nodes": str(nodes.count),
        "launch.node_rank": "none" if nodes.rank is None else "a number",
        "run.dir": str(run_dir.absolute()),
        "command": shlex.join([options.training_script, *words]),
    }


def _run(run_dir: Path, options: argparse.Namespace, others: Others) -> int:
    killed_before = oom_kills()
    try:
        torchrun.run(options)
    except SignalException:
        _outlast_ranks(options.shutdown_timeout)
        _report_left(run_dir)  # the save after a signal may be what has failed
        return PREEMPTED
    except (ChildFailedError, DistError, RendezvousError) as error:
        if others.stopped and _end_of(run_dir) is None:
            return PREEMPTED  # those of another node had left
        if isinstance(error, ChildFailedError) and not others.alone:
            rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode != -9, item[1].timestamp))
            return _report(run_dir, rank, failure, out_of_memory=oom_kills() > killed_before)
        return _report_loss(run_dir, repr(error) if not others.alone else "its ranks have failed")
    return DONE


def _outlast_ranks(seconds: float) -> None:
    """Wait for ranks that are still saving.

    torchrun waits for them after a first and a second signal and leaves at a third, and the ranks die with it. Where
    a cluster signals every process, this one gets each signal twice: its own, and what the launcher passes on.
    """
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.1)
        except ChildProcessError:
            return


def _end_of(run_dir: Path) -> dict[str, Any] | None:
    """The final status of this start, if there is one."""
    status = _status_of(run_dir, this_start())
    return status if status is not None and status["state"] != "running" else None


def _report_loss(run_dir: Path, reason: str) -> int:
    """Say what ended a node's part of the run where that was another node's end."""
    if not _report_left(run_dir) and _end_of(run_dir) is None:
        _say(f"sftdist: error: another node has ended, or does not come back ({reason}): its log says why")
    return FAILED


def _report(run_dir: Path, rank: int, failure: ProcessFailure, *, out_of_memory: bool) -> int:
    """Say on the last lines what ended the ranks: the first failure that one of them has left, or what is known of one
    that had no time to speak. The code that this process ends with: PREEMPTED where a rank did not yet take a stop
    signal over."""
    status, cause = _status_of(run_dir, this_start()), _cause(failure, out_of_memory=out_of_memory)
    if status is not None and status["state"] != "running":
        _report_left(run_dir, {rank: cause})
        return FAILED
    if -failure.exitcode in STOP_SIGNALS:
        return PREEMPTED
    who = f"rank {rank} on {socket.gethostname()} (process {failure.pid})"
    reason = f"{who} died: {cause}"
    tail = _tail(run_dir, rank)
    if tail:
        _say(f"sftdist: error: {reason}", *tail, f"its log is {log_file(run_dir, rank)}")
    else:
        _say(f"sftdist: error: {reason}; its last lines are above")
    if status is not None:
        write_status(run_dir, "failed", FAILED, reason, step=status["step"], rank=rank)
    return FAILED


def _report_left(run_dir: Path, deaths: Mapping[int, str] | None = None) -> bool:
    """Say what this start's first failure was, where a rank has left it; `deaths`: how torchrun saw ranks end."""
    left = read_failure(run_dir)
    if left is None or left.start != this_start():
        return False
    if left.kind not in TOLD_LAST:  # all of it is further above
        _say(headline(left), where(left, run_dir))
    elif left.kind == KILLED:
        known = replace(left, message=(deaths or {}).get(left.rank, left.message))
        _say(*lines(known), *_tail(run_dir, left.rank), where(left, run_dir))
    else:
        _say(*lines(left, run_dir))
    return True


def _cause(failure: ProcessFailure, *, out_of_memory: bool) -> str:
    code = failure.exitcode
    cause = f"ended by {failure.signal_name()}" if code < 0 else f"ended with exit code {code}"
    if out_of_memory:
        return f"{cause}: the host's memory ran out; use fewer ranks per host, or smaller packs (train.pack_tokens)"
    hint = _SIGNALS.get(-code)
    return f"{cause}: {hint}" if hint else cause


_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "someone or the kernel killed it; look at the host's memory and at the scheduler's log",
    signal.SIGBUS: "most often /dev/shm is full (df /dev/shm), or a file was cut while it was mapped",
}


def _tail(run_dir: Path, rank: int) -> list[str]:
    words = [f"  | {line}" for line in last_words(run_dir, rank)]
    return ["the last lines of its log:", *words] if words else []


def _say(*lines: str) -> None:
    print(fresh_line(sys.stderr) + "\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
