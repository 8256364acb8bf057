"""What this process is doing right now: a failure report names it, and the hang watch sees when it stops getting on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """`step`: the optimizer step under way, counted from 1; `rows`: the ids of its rows over all ranks;
    `count`: how many activities this process has begun."""

    phase: str = "starting"
    step: int | None = None
    rows: tuple[str, ...] = ()
    count: int = 0


class Progress:
    """Written by the main thread, read by the threads that watch it."""

    def __init__(self) -> None:
        self.now = Activity()
        self._recent: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=32)

    def begin_step(self, step: int, rows: Sequence[str]) -> None:
        """A new optimizer step over these rows."""
        self.now = Activity("fetching its packs", step, tuple(rows), count=self.now.count + 1)
        self._recent.append((step, self.now.rows))

    def rows_of(self, step: int | None) -> tuple[str, ...]:
        """The rows of one of the last steps: another rank may be a little behind. () for any other."""
        return next((rows for known, rows in list(self._recent) if known == step), ())

    def note(self, phase: str) -> None:
        """The same step goes on with something else: "forward and backward", "saving", ..."""
        before = self.now
        self.now = Activity(phase, before.step, before.rows, count=before.count + 1)


class Awake:
    """A clock of the seconds that this process was running: a suspended job has missed nothing meanwhile.

    One thread that never blocks calls `tick` twice a second; others read `seconds`.
    """

    LONGEST = 2.0  # between two ticks of a process that runs

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._last, self.LONGEST)
        self._last = now


class LastChange:
    """How long a value has stayed the same, by a clock that the caller reads."""

    def __init__(self, now: float) -> None:
        self.value: object = None
        self._since = now

    def age(self, value: object, now: float) -> float:
        """Seconds since `value` was first seen."""
        if value != self.value:
            self.value, self._since = value, now
        return now - self._since
