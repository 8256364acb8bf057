"""Child processes that get the stop signals of this one."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import FrameType, TracebackType
from typing import IO

from sftdist.core.distributed import STOP_SIGNALS, stops_at_once


class Children:
    """Context manager that passes stop signals on to the processes that were started with it.

    Each process gets the first one once, so that a cluster that signals every process cannot cut a save short; a second
    Ctrl-C goes on, too. `seen` counts what has come, the first one first; `first` is called with its number. Outside of
    the main thread, which alone gets signals, nothing is passed on.
    """

    def __init__(self, first: Callable[[int], None] | None = None) -> None:
        self.seen: Counter[int] = Counter()
        self._first = first
        self._untold: list[subprocess.Popen[bytes]] = []
        self._told: list[subprocess.Popen[bytes]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Children:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._stack.callback(signal.signal, number, signal.signal(number, self._forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(
        self, command: Sequence[str], env: Mapping[str, str], screen: IO[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        """A process with `screen` (default: ours) for its output, in a session of its own: Ctrl-C in the terminal
        reaches this process only, which passes it on."""
        errors = None if screen is None else subprocess.STDOUT
        child = subprocess.Popen(command, env=env, stdout=screen, stderr=errors, start_new_session=True)
        self._untold.append(child)
        if self.seen:  # it may have come while the process was being started
            self._tell(next(iter(self.seen)))
        return child

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if not self.seen and self._first is not None:
            self._first(number)
        if stops_at_once(self.seen, number):
            for child in self._told:
                child.send_signal(number)
        self.seen[number] += 1
        self._tell(number)

    def _tell(self, number: int) -> None:
        """The first signal to those that have not got one; a signal may come in between."""
        with suppress(IndexError):
            while True:
                child = self._untold.pop()
                self._told.append(child)
                child.send_signal(number)
