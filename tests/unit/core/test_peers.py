"""Every fault on real ranks: who is named, by whom, how often, and when everybody is gone."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess

import pytest
import torch

from sftdist.core.distributed import World
from tests.watched import Case, Outcome, play

ROWS = ("row-1", "row-2")
SLACK = 12.0  # seconds: a slow report, the others' last words, forty processes on two cores


def works(world: World) -> None:
    world.progress.begin_step(7, ROWS)
    world.barrier()


def raises(world: World) -> None:
    world.progress.begin_step(7, ROWS)
    world.progress.note("saving")
    if world.rank == 2:
        at_fault("only here")
    world.barrier()


def at_fault(what: str) -> None:
    raise ValueError(what)


def raises_in_a_collective(world: World) -> None:
    """An error of its own, which looks like the echo of a death."""
    world.progress.begin_step(7, ROWS)
    if world.rank == 1:
        torch.distributed.all_reduce("not a tensor")
    world.barrier()


def raises_beside_a_deaf_rank(world: World) -> None:
    if world.rank == 1:
        at_fault("only here")
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2_000_000_000)  # C: no Python handler, no exception


def is_killed(world: World) -> None:
    world.progress.begin_step(7, ROWS)
    world.progress.note("forward and backward")
    time.sleep(1)  # a beat later
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def is_stopped(world: World) -> None:
    world.progress.begin_step(7, ROWS)
    time.sleep(1)  # a beat later
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.barrier()


def sleeps(world: World) -> None:
    """The rank that hangs has begun later, and has begun more, than those who wait for it."""
    world.progress.begin_step(7, ROWS)
    if world.rank == 1:
        time.sleep(1)
        world.progress.note("looking up a row")
        falls_asleep()
    world.barrier()


def falls_asleep() -> None:
    time.sleep(120)


def one_works_while_all_wait(world: World) -> None:
    world.progress.begin_step(7, ROWS)
    for part in range(6 if world.is_main else 0):
        world.progress.note(f"writing part {part}")
        time.sleep(1)
    world.barrier()


def loads_for_long(world: World) -> None:
    time.sleep(4)
    world.barrier()


def leaves_early(world: World) -> None:
    """The ring closes over those who are done."""
    world.barrier()
    if world.rank == 1:
        sys.exit(0)
    time.sleep(11)


def needs_the_store(world: World) -> None:
    world.progress.begin_step(7, ROWS)
    time.sleep(120)


def is_suspended(world: World) -> None:
    world.progress.begin_step(7, ROWS)
    until = time.monotonic() + 11  # this clock goes on while a process is stopped
    while time.monotonic() < until:
        time.sleep(0.1)
    world.barrier()


def kill_store(store: BaseProcess, ranks: Sequence[BaseProcess]) -> None:
    store.kill()


def freeze_store(store: BaseProcess, ranks: Sequence[BaseProcess]) -> None:
    os.kill(store.pid or 0, signal.SIGSTOP)


def suspend_ranks(store: BaseProcess, ranks: Sequence[BaseProcess]) -> None:
    """As a scheduler suspends and resumes a job."""
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks:
            os.kill(process.pid or 0, number)
        time.sleep(6)


CASES = {
    "works": Case(works),
    "raises": Case(raises, size=4),
    "raises in a collective": Case(raises_in_a_collective),
    "raises beside a deaf rank": Case(raises_beside_a_deaf_rank, size=2),
    "is killed": Case(is_killed),
    "is stopped": Case(is_stopped, lost=6),
    "sleeps": Case(sleeps, hang=3),
    "one works while all wait": Case(one_works_while_all_wait, hang=2),
    "loads for long": Case(loads_for_long, hang=1),
    "leaves early": Case(leaves_early, lost=7),
    "the store dies": Case(needs_the_store, size=2, outside=kill_store),
    "the store is out of reach": Case(needs_the_store, size=2, lost=3, outside=freeze_store),
    "is suspended": Case(is_suspended, size=2, lost=5, hang=9, outside=suspend_ranks),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Outcome]]:
    """All cases at once: most of them do nothing but wait."""
    with ThreadPoolExecutor(len(CASES)) as pool:
        running: dict[str, Future[Outcome]] = {
            name: pool.submit(play, case, tmp_path_factory.mktemp("case")) for name, case in CASES.items()
        }
        yield lambda name: running[name].result(120)


Outcomes = Callable[[str], Outcome]


@pytest.mark.parametrize(
    "name", ["works", "one works while all wait", "loads for long", "leaves early", "is suspended"]
)
def test_nobody_is_accused(outcomes: Outcomes, name: str) -> None:
    outcome = outcomes(name)
    assert outcome.reports == []
    assert set(outcome.codes) == {0}


def test_a_rank_that_raises(outcomes: Outcomes) -> None:
    outcome = outcomes("raises")
    report = outcome.report
    assert (report.rank, report.kind, report.step, report.phase, report.rows) == (2, "error", 7, "saving", ROWS)
    assert (report.message, report.code, report.retry) == ("ValueError: only here", 1, True)
    assert "in at_fault" in report.traceback
    assert outcome.codes == [1] * 4
    assert outcome.seconds < SLACK


def test_an_error_in_a_collective_is_told_from_a_death(outcomes: Outcomes) -> None:
    outcome = outcomes("raises in a collective")
    assert (outcome.report.rank, outcome.report.kind) == (1, "error")
    assert "not a tensor" in outcome.report.message or "tensor" in outcome.report.message.lower()
    assert outcome.seconds < SLACK, "nobody waits to hear of the dead when all live"


def test_a_rank_in_c_code_ends_too(outcomes: Outcomes) -> None:
    outcome = outcomes("raises beside a deaf rank")
    assert outcome.report.rank == 1
    assert outcome.codes == [1, 1]
    assert outcome.seconds < SLACK


def test_a_killed_rank_is_named_not_the_echo(outcomes: Outcomes) -> None:
    outcome = outcomes("is killed")
    report = outcome.report
    assert (report.rank, report.kind, report.step, report.rows) == (1, "killed", 7, ROWS)
    assert "without a word" in report.message
    assert outcome.codes == [1, -signal.SIGKILL, 1]
    assert outcome.seconds < SLACK


def test_a_stopped_rank_is_lost_and_does_not_stay(outcomes: Outcomes) -> None:
    outcome = outcomes("is stopped")
    assert (outcome.report.rank, outcome.report.kind, outcome.report.step) == (1, "lost", 7)
    assert "stopped" in outcome.report.message
    assert outcome.codes == [1, -signal.SIGKILL, 1]
    assert outcome.seconds < 1 + 6 + SLACK


def test_the_one_that_holds_up_the_rest_is_named(outcomes: Outcomes) -> None:
    outcome = outcomes("sleeps")
    report = outcome.report
    assert (report.rank, report.kind, report.phase, report.rows) == (1, "stalled", "looking up a row", ROWS)
    assert "in falls_asleep" in report.traceback
    assert "2 waiting in step 7" in report.message
    assert outcome.codes == [1, 1, 1]
    assert outcome.seconds < 1 + 3 + SLACK


@pytest.mark.parametrize(
    ("name", "reason", "bound"),
    [("the store dies", "store has ended", 2 + SLACK), ("the store is out of reach", "no contact with", 2 + 3 + SLACK)],
)
def test_without_the_store_a_host_says_so_once(outcomes: Outcomes, name: str, reason: str, bound: float) -> None:
    outcome = outcomes(name)
    assert (outcome.report.rank, outcome.report.kind, outcome.report.step) == (0, "lost", 7)
    assert reason in outcome.report.message
    assert outcome.codes == [1, 1]
    assert outcome.seconds < bound
