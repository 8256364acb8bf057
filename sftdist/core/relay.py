"""A stop signal to the agent of one node stops those of all, and one that gives up ends the ranks of all.

torchrun's agents hear nothing of each other. The ranks agree on a stop and watch each other, but only once all of them
have started: until then those of one node would wait for minutes for those of another, and an agent whose ranks have
left does so for one that was told to leave.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType

import psutil
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException

from sftdist.core.distributed import STOP_SIGNALS

POLL_SECONDS = 0.5
LINGER_SECONDS = 5.0  # how long the process that serves the store stays for the others to hear of a stop
ALONE_SECONDS = 20.0  # for ranks to end by themselves when those of another node have failed
END_SECONDS = 2.0  # for the threads to end; they are blocked where the network is cut
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)


class Others:
    """What an agent knows of those of other nodes; by itself, that there are none."""

    @property
    def stopped(self) -> bool:
        """Whether any node has got a stop signal, as far as this one can know."""
        return False

    @property
    def alone(self) -> bool:
        """Whether the ranks of this node were killed because those of another have failed."""
        return False


class Relay(Others):
    """Context manager for the main thread of `members` processes at one store; this one may be `serving` it.

    A stop signal raises torchrun's SignalException in the process that gets it, and TERM does in all others. Where one
    has failed (`fail`), the children of the others are killed if they do not end by themselves.
    """

    def __init__(self, store: dist.Store, members: int, *, serving: bool) -> None:
        self._store = store
        self._members = members
        self._serving = serving
        self._knows = threading.Event()  # this process has got a signal
        self._over = threading.Event()
        self._alone = threading.Event()  # another one has failed, and our ranks were killed

    def __enter__(self) -> Relay:
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
        with suppress(dist.DistError):
            return self._knows.is_set() or self._store.check(["stop"])
        return self._knows.is_set()

    @property
    def alone(self) -> bool:
        return self._alone.is_set()

    def fail(self) -> None:
        """Tell the others that this one has given up."""
        with suppress(dist.DistError):
            self._store.set("failed", "1")

    def _tell(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe, suppress(dist.DistError):
            while data := pipe.read(1):
                if data[0] in SIGNALS and not self._knows.is_set():
                    self._knows.set()
                    self._store.set("stop", signal.Signals(data[0]).name)
                    self._store.add("stopped", 1)

    def _listen(self) -> None:
        failed_at: float | None = None
        while not self._over.wait(POLL_SECONDS):
            news = self._news()
            if news == "stop":
                if not self._knows.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            if news == "failed" and failed_at is None:
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + ALONE_SECONDS:
                self._alone.set()
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        child.kill()

    def _news(self) -> str | None:
        try:
            return next((word for word in ("stop", "failed") if self._store.check([word])), None)
        except dist.DistError:  # who serves the store has ended, and could not say why
            return "failed"

    def _linger(self) -> None:
        deadline = time.monotonic() + LINGER_SECONDS
        while self._store.add("stopped", 0) < self._members and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SignalException(f"process {os.getpid()} got signal {number}", sigval=signal.Signals(number))
