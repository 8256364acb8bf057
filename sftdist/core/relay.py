"""A stop signal to the agent of one node stops those of all.

torchrun's agents do not hear of each other's signals. The ranks agree on a stop by themselves, but only once they
train, and an agent whose ranks have left waits for minutes for one that was told to leave.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException

from sftdist.core.distributed import STOP_SIGNALS

POLL_SECONDS = 0.5
LINGER_SECONDS = 5.0  # how long the process that serves the store stays for the others to hear of a stop
END_SECONDS = 2.0  # for the threads to end; they are blocked where the network is cut
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)


class StopRelay:
    """Context manager for the main thread of `members` processes at one store; this one may be `serving` it.

    A stop signal raises torchrun's SignalException in the process that gets it, and TERM does in all others.
    """

    def __init__(self, store: dist.Store, members: int, *, serving: bool) -> None:
        self._store = store
        self._members = members
        self._serving = serving
        self._knows = threading.Event()  # this process has got a signal
        self._over = threading.Event()

    def __enter__(self) -> StopRelay:
        for number in SIGNALS:
            signal.signal(number, _leave)
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # torchrun puts its own handlers in the place of ours: the C handler below both writes the number to this pipe.
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        teller = threading.Thread(target=self._tell, args=(read,), name="stop-teller", daemon=True)
        listener = threading.Thread(target=self._listen, name="stop-listener", daemon=True)
        self._threads = (teller, listener)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        signal.set_wakeup_fd(-1)
        os.close(self._write)
        for thread in self._threads:
            thread.join(END_SECONDS)
        if self._serving and self._knows.is_set():
            self._linger()

    @property
    def stopped(self) -> bool:
        """Whether any member has got a stop signal, as far as this one can know."""
        with suppress(dist.DistError):
            return self._knows.is_set() or self._store.check(["stop"])
        return self._knows.is_set()

    def _tell(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe, suppress(dist.DistError):
            while data := pipe.read(1):
                if data[0] in SIGNALS and not self._knows.is_set():
                    self._knows.set()
                    self._store.set("stop", signal.Signals(data[0]).name)
                    self._store.add("stopped", 1)

    def _listen(self) -> None:
        with suppress(dist.DistError):  # the store has ended, and with it the run
            while not self._over.wait(POLL_SECONDS):
                if self._store.check(["stop"]):
                    if not self._knows.is_set():
                        os.kill(os.getpid(), signal.SIGTERM)
                    return

    def _linger(self) -> None:
        deadline = time.monotonic() + LINGER_SECONDS
        while self._store.add("stopped", 0) < self._members and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SignalException(f"process {os.getpid()} got signal {number}", sigval=signal.Signals(number))
