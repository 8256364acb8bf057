"""Stop signals that a command passes on to the processes that it has started."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from sftdist.core.distributed import STOP_SIGNALS, stops_at_once


@contextmanager
def forward_stops(children: Callable[[], Iterable[subprocess.Popen[bytes]]]) -> Iterator[Counter[int]]:
    """Pass stop signals on to `children()`, the ones that run then; what has come, first one first.

    Once, so that a cluster that signals every process cannot cut a save short; a second Ctrl-C goes on, too. Outside of
    the main thread, which alone gets signals, nothing is done.
    """
    seen: Counter[int] = Counter()

    def forward(number: int, frame: FrameType | None) -> None:
        if not seen or stops_at_once(seen, number):
            for child in children():
                child.send_signal(number)
        seen[number] += 1

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
