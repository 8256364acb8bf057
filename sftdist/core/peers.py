"""The failure watch: a rank that fails, dies, is cut off or stands still is named, and the others end in bounded time.

Without it they wait in a collective until its timeout, or until torchrun's shutdown timeout, which has to be as
long as a save may take. Two threads: one talks to the rendezvous store, where every operation may block for ever when
the network is cut; the other one touches no network and ends the process when the first gets no answer.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from sftdist.core.collectives import from_collective
from sftdist.core.errors import SftdistError
from sftdist.core.failure import KILLED, LOST, STALLED, Failure, failure_of, here, lines
from sftdist.core.oom import oom_kills
from sftdist.core.processes import alive, stopped
from sftdist.core.progress import Awake, LastChange, Progress
from sftdist.core.ranklog import tell
from sftdist.core.standstill import HangWatch, everybody
from sftdist.core.vitals import Vitals

POLL_SECONDS = 0.5
BEAT_SECONDS = 3.0  # at the latest; sooner when there is something new to tell
LAST_WORDS_SECONDS = 3.0  # for a rank that has hit the same error by itself and is about to say so
READ_SECONDS = 1.0  # for the others to read of a failure before this rank's agent ends, and the store with it
REPORT_SECONDS = 10.0  # a report is written to a file system that may have gone with the network
END_SECONDS = 30.0  # more than all of these together


class PeerError(SftdistError):
    """This rank failed after another had: the other's error is the one to report."""


@dataclass(frozen=True)
class Rank:
    """This rank among `size`, and the ranks of its host."""

    number: int
    size: int
    local: range


@dataclass(frozen=True)
class Patience:
    """Seconds: `lost`: how long nothing may be heard of a rank or of the store; `hang`: how long no rank may get on."""

    lost: float
    hang: float


@dataclass(frozen=True)
class Notice:
    """What the ranks hear of the first failure: whose it is, who reports it, and the headline."""

    rank: int
    pid: int
    kind: str
    reporter: int
    text: str


class Peers:
    """One rank's view of the others. `connect` opens a store connection, which serves one thread at a time."""

    def __init__(
        self,
        me: Rank,
        connect: Callable[[], dist.Store],
        progress: Progress,
        patience: Patience,
        report: Callable[[Failure], None],
    ) -> None:
        self._me = me
        self._progress = progress
        self._patience = patience
        self._report = report
        self._tell, self._store = connect(), connect()  # the main thread's and the talking thread's
        self._failing = threading.Event()  # the main thread has an error and is about to say it
        self._known = threading.Event()  # a failure is known: what follows needs no network
        self._left = threading.Event()  # the main thread has said its error, or is done
        self._own: Failure | None = None
        self._claiming = threading.Lock()  # held until a report is written: the process must not end before
        self._reporting = threading.Lock()
        self._oom_kills = oom_kills()
        self._clock = Awake()
        self._contact = 0.0
        self._beats, self._told, self._next_beat = 0, 0, 0.0
        self._beat_seconds = min(BEAT_SECONDS, patience.lost / 4)
        self._locals: dict[int, Vitals] = {}
        self._next = me.number
        self._heard = LastChange(0.0)
        self._hangs = HangWatch(self._store, me.size, patience.hang)
        self._present = False

    def join(self) -> None:
        """Announce this rank and start to watch."""
        self._beat()
        self._watch_next()
        for thread in (self._talk, self._guard):
            threading.Thread(target=thread, name="peers", daemon=True).start()

    def fail(self, error: BaseException) -> bool:
        """Report this rank's error, where it is the first failure of all ranks; True then.

        A collective fails within a moment of a peer's death: that death is the failure then, not its echo here.
        """
        self._failing.set()
        failure, echo = failure_of(error, self._me.number, self._progress.now), from_collective(error)
        if not echo:
            self._own = failure
        try:
            if echo:
                self._await_cause()
            first = self._claim(self._tell, failure)
        except dist.DistError as gone:
            if echo:
                self._end_cut_off(_store_gone(gone))
            self._say(failure)
            first = True
        if first:
            time.sleep(READ_SECONDS)
        self._left.set()
        return first

    def leave(self) -> None:
        """Stop watching and being watched: this rank is done."""
        with suppress(dist.DistError):  # then nobody is left to be told
            self._tell.set(f"left/{self._me.number}", "1")
            self._tell.add("left", 1)
        with self._claiming:
            self._left.set()

    # The thread that talks to the store.

    def _talk(self) -> None:
        try:
            while not self._left.wait(POLL_SECONDS):
                self._round()
                self._contact = self._clock.seconds
        except dist.DistError as gone:
            if not self._left.wait(LAST_WORDS_SECONDS):
                self._end_cut_off(_store_gone(gone))

    def _round(self) -> None:
        if self._clock.seconds >= self._next_beat or self._progress.now.count != self._told:
            self._beat()
        if self._store.check(["failure"]):
            self._end_after(Notice(**json.loads(self._store.get("failure"))))
        if not self._present and self._store.check(["roll call"]):
            self._store.add("present", 1)
            self._present = True
        self._look_for_deaths()
        self._listen()
        self._look_for_standstill()

    def _beat(self) -> None:
        self._beats += 1
        self._told = self._progress.now.count
        self._next_beat = self._clock.seconds + self._beat_seconds
        self._store.set(f"beat/{self._me.number}", self._vitals().packed())

    def _vitals(self) -> Vitals:
        return Vitals.of(self._me.number, self._progress.now, self._beats)

    def _look_for_deaths(self) -> None:
        """Ranks of this host that have announced themselves, have ended, and did not say that they were done."""
        for peer in self._me.local:
            if peer not in self._locals and self._store.check([f"beat/{peer}"]):
                self._locals[peer] = Vitals.unpacked(self._store.get(f"beat/{peer}"))
        for peer, known in self._locals.items():
            if not alive(known.pid) and not self._has_left(peer):
                self._report_other(peer, KILLED, _death(out_of_memory=oom_kills() > self._oom_kills))

    def _listen(self) -> None:
        """To the next rank that is still there: a ring, so that the store serves one reader per rank."""
        if self._next == self._me.number or not self._store.check([f"beat/{self._next}"]):
            return
        silence = self._heard.age(self._store.get(f"beat/{self._next}"), self._clock.seconds)
        if silence > 2 * self._beat_seconds and self._has_left(self._next):
            self._watch_next()
        elif silence > self._patience.lost:
            self._report_other(self._next, LOST, self._silent(silence))

    def _watch_next(self) -> None:
        self._next = (self._next + 1) % self._me.size
        self._heard = LastChange(self._clock.seconds)

    def _silent(self, seconds: float) -> str:
        known = self._locals.get(self._next)
        if known is not None and stopped(known.pid):
            return f"not heard of for {seconds:.0f} s: its process is stopped (by SIGSTOP or a debugger)"
        return (
            f"not heard of for {seconds:.0f} s: the network is cut, the host is down or the process is frozen (stopped)"
        )

    def _look_for_standstill(self) -> None:
        found = self._hangs.look(self._vitals(), self._clock.seconds)
        if found is not None:
            slowest, reason = found
            self._report_other(slowest.vitals.rank, STALLED, reason, slowest.stack)

    # Failures.

    def _report_other(self, peer: int, kind: str, message: str, stack: str = "") -> None:
        known = Vitals.unpacked(self._store.get(f"beat/{peer}"))
        failure = known.failure(kind, self._progress.rows_of(known.step), message, stack)
        self._claim(self._store, failure)

    def _claim(self, store: dist.Store, failure: Failure) -> bool:
        """Report it where it is the first failure of all ranks; True then."""
        notice = Notice(failure.rank, failure.pid, failure.kind, self._me.number, lines(failure)[0])
        mine = json.dumps(asdict(notice))
        with self._claiming:
            first = store.compare_set("failure", "", mine).decode("utf-8") == mine
            self._known.set()
            if first:
                self._say(failure)
        return first

    def _say(self, failure: Failure) -> None:
        """Report, once in this process."""
        if self._reporting.acquire(blocking=False):
            teller = threading.Thread(target=self._report, args=(failure,), name="report", daemon=True)
            teller.start()
            teller.join(REPORT_SECONDS)

    def _end_after(self, first: Notice) -> None:
        """Another rank has failed: this one ends, as soon as its main thread has had its say."""
        self._known.set()
        frozen = first.kind == LOST and first.rank in self._me.local and first.rank != self._me.number
        if frozen:  # it cannot end itself
            with suppress(ProcessLookupError):
                os.kill(first.pid, signal.SIGKILL)
        if self._me.number == self._me.local.start and first.reporter not in self._me.local:
            tell(first.text)
        if not self._left.wait(LAST_WORDS_SECONDS) and not (self._failing.is_set() and self._left.wait(REPORT_SECONDS)):
            _end(first.text)

    def _await_cause(self) -> None:
        """Wait until another rank's failure is known, or all ranks are known to live: then this error is the cause."""
        self._tell.set("roll call", "1")
        deadline = time.monotonic() + self._patience.lost + 2 * BEAT_SECONDS
        while time.monotonic() < deadline and not self._tell.check(["failure"]):
            if everybody(self._tell, "present", self._me.size):
                return
            time.sleep(POLL_SECONDS / 2)

    # The thread that touches no network.

    def _guard(self) -> None:
        while not (self._left.wait(POLL_SECONDS) or self._known.is_set()):
            self._clock.tick()
            silence = self._clock.seconds - self._contact
            if silence > self._patience.lost:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                self._end_cut_off(
                    f"no contact with the rendezvous store at {where} for {silence:.0f} s: "
                    "the network is cut or that host is down"
                )
        if not self._left.wait(END_SECONDS):
            _end("another rank has failed, and this one could not end by itself")

    def _end_cut_off(self, reason: str) -> None:
        """Without a store the ranks of a host agree by themselves: the first that still runs reports, and all end."""
        if not any(alive(known.pid) for peer, known in list(self._locals.items()) if peer < self._me.number):
            self._say(self._own or here(LOST, self._me.number, self._progress.now, reason))
        time.sleep(LAST_WORDS_SECONDS)
        _end(reason)

    def _has_left(self, peer: int) -> bool:
        return self._store.check([f"left/{peer}"])


def _end(reason: str) -> NoReturn:
    """End this process, whatever its main thread is blocked in; torchrun's own table of failures shows the reason."""
    try:
        raise PeerError(reason)
    except PeerError as error:
        get_error_handler().record_exception(error)
    os._exit(1)


def _death(*, out_of_memory: bool) -> str:
    if out_of_memory:
        return (
            "memory ran out, on the host or in its control group, and the kernel killed it; "
            "use fewer ranks per host, smaller packs (train.pack_tokens) or more memory"
        )
    return (
        "it ended without a word: someone or the kernel killed it, or it crashed; "
        "look at the scheduler's log and the kernel's (dmesg)"
    )


def _store_gone(error: dist.DistError) -> str:
    return f"the rendezvous store has ended, and with it the first host's torchrun: its log says why ({error})"
