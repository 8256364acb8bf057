"""Ranks in a watched session, with a fault of their own or from without, run to their ends."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore

from sftdist.core.distributed import World, session
from sftdist.core.failure import Failure
from tests.ranks import context, rank_environment


@dataclass
class Case:
    """`before()` is called in each rank before its session, `outside(store, ranks)` here, two seconds after all ranks
    have entered theirs."""

    fn: Callable[[World], None]
    size: int = 3
    lost: float = 60.0
    hang: float = 1800.0
    before: Callable[[], None] | None = None
    outside: Callable[[BaseProcess, Sequence[BaseProcess]], None] | None = None


@dataclass
class Outcome:
    """`codes`: exit codes by rank; `seconds`: from the moment that all ranks were in the session to the last exit."""

    codes: list[int | None]
    seconds: float
    reports: list[Failure]
    stderr: list[str] = field(repr=False)

    @property
    def report(self) -> Failure:
        assert len(self.reports) == 1, self
        return self.reports[0]


def play(case: Case, folder: Path) -> Outcome:
    """Run the ranks of a case to their ends, a minute at most."""
    receive, send = context.Pipe(duplex=False)
    store = context.Process(target=serve_store, args=(send,), daemon=True)
    store.start()
    port = receive.recv()
    ranks = [
        context.Process(target=run_rank, args=(case, rank_environment(rank, case.size, port), folder), daemon=True)
        for rank in range(case.size)
    ]
    try:
        for process in ranks:
            process.start()
        while len(list(folder.glob("*.in"))) < case.size:
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.05)
        began = time.monotonic()
        if case.outside is not None:
            time.sleep(2)
            case.outside(store, ranks)
        waiting = {process.sentinel for process in ranks}
        while waiting and time.monotonic() < began + 60:
            waiting -= set(wait(waiting, 1))
        seconds = time.monotonic() - began
    finally:
        for process in [*ranks, store]:
            process.kill()
            process.join()
    lines = (folder / "reports").read_text().splitlines() if (folder / "reports").exists() else []
    reports = [Failure(**{**json.loads(line), "rows": tuple(json.loads(line)["rows"])}) for line in lines]
    stderr = [(folder / f"{rank}.err").read_text() for rank in range(case.size)]
    return Outcome([process.exitcode for process in ranks], seconds, reports, stderr)


def serve_store(pipe: Connection) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(300)


def run_rank(case: Case, environment: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    rank = environment["RANK"]
    if case.before is not None:
        case.before()
    sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
    with session(report=partial(record, folder), lost_seconds=case.lost, hang_seconds=case.hang) as world:
        world.barrier()
        (folder / f"{rank}.in").touch()
        case.fn(world)


def record(folder: Path, failure: Failure) -> None:
    time.sleep(1.5)  # a shared file system may be slow: no rank may end before its report is written
    with (folder / "reports").open("a") as file:
        file.write(json.dumps(asdict(failure)) + "\n")
