"""What a rank tells the others of itself: that it lives, what it is doing, and, when all stand still, where it is."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from sftdist.core.failure import Failure, here
from sftdist.core.progress import Activity

_COLLECTIVES = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""))
# On CUDA a collective only queues work: a rank waits where it next asks the device for something.
_DEVICE_WAITS = (".item()", ".tolist()", ".cpu()", "synchronize()")


@dataclass(frozen=True)
class Vitals:
    """`count`: how many activities the rank has begun; `beat` changes each time that it says so."""

    rank: int
    host: str
    pid: int
    step: int | None
    phase: str
    count: int
    beat: int

    @classmethod
    def of(cls, rank: int, doing: Activity, beat: int) -> Vitals:
        return cls(rank, socket.gethostname(), os.getpid(), doing.step, doing.phase, doing.count, beat)

    def failure(self, kind: str, rows: tuple[str, ...], message: str, trace: str = "") -> Failure:
        """What another rank reports of this one."""
        found = here(kind, self.rank, Activity(self.phase, self.step, rows), message)
        return replace(found, host=self.host, pid=self.pid, traceback=trace)


@dataclass(frozen=True)
class Standstill:
    """A rank that does not get on: its main thread's stack and innermost line, and whether it waits for others."""

    vitals: Vitals
    stack: str
    place: str
    waits: bool

    @classmethod
    def of(cls, vitals: Vitals) -> Standstill:
        """This process, now."""
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        innermost = frames[-1]
        waits = any(map(_in_collective, frames)) or any(word in (innermost.line or "") for word in _DEVICE_WAITS)
        stack = "Main thread (most recent call last):\n" + "".join(traceback.format_list(frames))
        return cls(vitals, stack, f"{innermost.filename}:{innermost.lineno}", waits)


def pack(said: Vitals | Standstill) -> str:
    """As JSON."""
    return json.dumps(asdict(said))


def unpack_vitals(text: str | bytes) -> Vitals:
    return Vitals(**json.loads(text))


def unpack_standstill(text: str | bytes) -> Standstill:
    fields = json.loads(text)
    return Standstill(**{**fields, "vitals": Vitals(**fields["vitals"])})


def culprit(ranks: Sequence[Standstill]) -> Standstill:
    """Who holds up the others: the furthest behind in steps; then who is not waiting for others; then in activities;
    then who is where few are."""
    places = Counter(one.place for one in ranks)

    def order(one: Standstill) -> tuple[int, bool, int, int, int]:
        mine = one.vitals
        return mine.step or 0, one.waits, mine.count, places[one.place], mine.rank

    return min(ranks, key=order)


def others_doing(ranks: Iterable[Standstill]) -> str:
    """How many ranks wait or work at what, in one line."""
    found = Counter((one.waits, one.vitals.step, one.vitals.phase) for one in ranks)
    said = [
        f"{count} {'waiting' if waits else 'busy'} in step {step}, {phase}"
        for (waits, step, phase), count in found.items()
    ]
    return f"of the others: {'; '.join(said)}"


def from_collective(error: BaseException) -> bool:
    """Whether an exception, or what it came from, was raised inside a collective call."""
    return any(_in_collective(frame) for one in _chain(error) for frame in traceback.extract_tb(one.__traceback__))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _in_collective(frame: traceback.FrameSummary) -> bool:
    return any(folder in frame.filename for folder in _COLLECTIVES)
