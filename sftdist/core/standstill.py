"""A job that stands still: every rank says where its main thread is, and one judges which of them holds up the rest."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from sftdist.core.collectives import in_collective
from sftdist.core.progress import LastChange
from sftdist.core.vitals import Vitals

# On CUDA a collective only queues work: a rank waits where it next asks the device for something.
_DEVICE_WAITS = (".item()", ".tolist()", ".cpu()", "synchronize()")


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
        waits = any(map(in_collective, frames)) or any(word in (innermost.line or "") for word in _DEVICE_WAITS)
        stack = "Main thread (most recent call last):\n" + "".join(traceback.format_list(frames))
        return cls(vitals, stack, f"{innermost.filename}:{innermost.lineno}", waits)

    @classmethod
    def unpacked(cls, text: str | bytes) -> Standstill:
        fields = json.loads(text)
        return cls(**{**fields, "vitals": Vitals(**fields["vitals"])})

    def packed(self) -> str:
        return json.dumps(asdict(self))


class HangWatch:
    """One rank's part: has any rank got on in the last `seconds`? A rank that works while the others wait for it is
    no hang. Loading a model may take long, so the watch begins with the first activity of any rank."""

    def __init__(self, store: dist.Store, size: int, seconds: float) -> None:
        self._store = store
        self._size = size
        self._seconds = seconds
        self._begun = self._stands = False
        self._moved = LastChange(0.0)

    def look(self, mine: Vitals, now: float) -> tuple[Standstill, str] | None:
        """Who holds up the rest, and the reason, on the one rank that judges; else None. `now`: seconds."""
        stands = self._stands_still(mine, now)
        if stands != self._stands:
            self._stands = stands
            self._store.set(f"standstill/{mine.rank}", Standstill.of(mine).packed())
            self._store.add("standing", 1 if stands else -1)
        if not (stands and everybody(self._store, "standing", self._size)):
            return None
        judge = self._store.compare_set("judge", "", str(mine.rank)).decode("utf-8")
        return self._judge() if judge == str(mine.rank) else None

    def _stands_still(self, mine: Vitals, now: float) -> bool:
        if not self._begun and (mine.count or self._store.check(["begun"])):
            self._store.set("begun", "1")
            self._begun = True
        age = self._moved.age((mine.count, self._begun), now)
        return self._begun and age > self._seconds

    def _judge(self) -> tuple[Standstill, str]:
        names = [f"standstill/{rank}" for rank in range(self._size)]
        ranks = [Standstill.unpacked(self._store.get(name)) for name in names if self._store.check([name])]
        slowest = culprit(ranks)
        others = [one for one in ranks if one != slowest]
        reason = f"no rank has got on for {self._seconds:.0f} s, and this one holds up the others"
        return slowest, f"{reason} ({others_doing(others)})" if others else reason


def everybody(store: dist.Store, counter: str, size: int) -> bool:
    """Whether every rank that has not left has counted itself."""
    return store.add(counter, 0) + store.add("left", 0) >= size


def culprit(ranks: Sequence[Standstill]) -> Standstill:
    """Who holds up the others: the furthest behind in steps; then who is not waiting for others; then in activities;
    then who is where few are."""
    places = Counter(one.place for one in ranks)

    def order(one: Standstill) -> tuple[int, bool, int, int, int]:
        mine = one.vitals
        return mine.step or 0, one.waits, mine.count, places[one.place], mine.rank

    return min(ranks, key=order)


def others_doing(ranks: Sequence[Standstill]) -> str:
    """How many ranks wait or work at what, in one line."""
    found = Counter((one.waits, one.vitals.step, one.vitals.phase) for one in ranks)
    said = [
        f"{count} {'waiting' if waits else 'busy'} in step {step}, {phase}"
        for (waits, step, phase), count in found.items()
    ]
    return f"of the others: {'; '.join(said)}"
