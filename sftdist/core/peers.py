"""The failure watch: a rank that fails, or dies without a word, ends the others within seconds.

Without it they wait in a collective until its timeout, or until torchrun's shutdown timeout, which has to be as
long as a save may take.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from sftdist.core.errors import SftdistError

POLL_SECONDS = 0.5
DYING_SECONDS = 0.2  # between the end of a process's sockets and its own
LAST_WORDS_SECONDS = 3.0  # for a rank that has hit the same error by itself and is about to say so


class PeerError(SftdistError):
    """This rank failed after another had: the other's error is the one to report."""


class Peers:
    """One rank's view of the others, over a store connection of its own and a daemon thread."""

    def __init__(self, rank: int, local_ranks: range, prefix: str, report: Callable[[int, str], None]) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connect = timedelta(seconds=60)
        # Two connections: a store connection serves one thread at a time.
        self._tell, self._watch = (
            dist.PrefixStore(prefix, dist.TCPStore(host, port, timeout=connect, wait_for_workers=False))
            for _ in range(2)
        )
        self._rank = rank
        self._locals = [peer for peer in local_ranks if peer != rank]
        self._left = threading.Event()
        self._report = report
        self._first: bool | None = None

    @classmethod
    def join(cls, rank: int, local_rank: int, prefix: str, report: Callable[[int, str], None]) -> Peers:
        """Announce this rank and start to watch: all ranks for failures, those of this host for being alive.

        `report(rank, text)` is called on one rank of all when a rank has died without a word.
        """
        first = rank - local_rank
        local_ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        peers = cls(rank, local_ranks, prefix, report)
        peers._tell.set(f"pid/{rank}", str(os.getpid()))
        threading.Thread(target=peers._run, name="peers", daemon=True).start()
        return peers

    def fail(self, text: str) -> bool:
        """Publish this rank's failure; True where it is the first one (and again, when asked again).

        A collective fails within a moment of a peer's death: that death is the failure then, not its echo here.
        """
        if self._first is None:
            self._left.set()
            time.sleep(DYING_SECONDS)
            self._publish_deaths(self._tell)
            self._first = _publish(self._tell, self._rank, text)
        return self._first

    def leave(self) -> None:
        """Stop watching and being watched: this rank is done."""
        self._left.set()
        self._tell.set(f"left/{self._rank}", "1")

    def _run(self) -> None:
        try:
            while not self._left.wait(POLL_SECONDS):
                self._publish_deaths(self._watch)
                if self._watch.check(["failure"]) and not self._left.wait(LAST_WORDS_SECONDS):
                    os._exit(1)
        except dist.DistError as error:  # the store went with its host: collectives and torchrun report the rest
            if not self._left.is_set():
                print(f"rank {self._rank}: the rendezvous store is gone ({error})", file=sys.stderr, flush=True)

    def _publish_deaths(self, store: dist.Store) -> None:
        for peer in self._locals:
            if _died(store, peer) and _publish(store, peer, _DEATH):
                self._report(peer, _DEATH)


_DEATH = "it died without a word; the kernel kills a process when memory runs out"


def print_death(rank: int, text: str) -> None:
    """The default report: one line on standard error."""
    print(f"sftdist: error: rank {rank}: {text}", file=sys.stderr, flush=True)


def _publish(store: dist.Store, rank: int, text: str) -> bool:
    mine = json.dumps({"rank": rank, "text": text})
    return store.compare_set("failure", "", mine).decode("utf-8") == mine


def _died(store: dist.Store, rank: int) -> bool:
    """True for a rank of this host that has announced itself, has ended, and did not say that it was done."""
    if not store.check([f"pid/{rank}"]) or _alive(int(store.get(f"pid/{rank}"))):
        return False
    return not store.check([f"left/{rank}"])


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()  # without a /proc nobody can be declared dead
    except ProcessLookupError:
        return False
