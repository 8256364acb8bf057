"""The failure watch: a rank that fails, or dies without a word, ends the others within seconds.

Without it they wait in a collective until its timeout, or until torchrun's shutdown timeout, which has to be as
long as a save may take.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 3.0  # for a rank that has hit the same error by itself and is about to say so


class Peers:
    """One rank's view of the others, over a store connection of its own and a daemon thread."""

    def __init__(self, rank: int, local_ranks: range, prefix: str) -> None:
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

    @classmethod
    def join(cls, rank: int, size: int, local_rank: int, prefix: str) -> Peers:
        """Announce this rank and start to watch: all ranks for failures, those of this host for being alive."""
        first = rank - local_rank
        last = min(size, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        peers = cls(rank, range(first, last), prefix)
        peers._tell.set(f"pid/{rank}", str(os.getpid()))
        threading.Thread(target=peers._run, name="peers", daemon=True).start()
        return peers

    def fail(self, text: str) -> bool:
        """Publish this rank's failure; True where it is the first one.

        A collective fails within a moment of a peer's death: that death is the failure then, not its echo here.
        """
        self._left.set()
        for peer in self._locals:
            if _died(self._tell, peer):
                _publish(self._tell, peer, _DEATH)
        return _publish(self._tell, self._rank, text)

    def leave(self) -> None:
        """Stop watching and being watched: this rank is done."""
        self._left.set()
        self._tell.set(f"left/{self._rank}", "1")

    def _run(self) -> None:
        try:
            while not self._left.wait(POLL_SECONDS):
                for peer in self._locals:
                    if _died(self._watch, peer):
                        _publish(self._watch, peer, _DEATH)
                if self._watch.check(["failure"]):
                    self._end(json.loads(self._watch.get("failure")))
        except dist.DistError as error:  # the store went with its host: collectives and torchrun report the rest
            if not self._left.is_set():
                print(f"rank {self._rank}: the rendezvous store is gone ({error})", file=sys.stderr, flush=True)

    def _end(self, failure: dict[str, str | int]) -> None:
        if self._left.wait(LAST_WORDS_SECONDS):
            return
        reason = str(failure["text"]).strip().splitlines()[-1:]
        line = f"rank {self._rank} stops because rank {failure['rank']} failed: {' '.join(reason)}"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)


_DEATH = "it died without a word; the kernel ends a process with SIGKILL when memory runs out"


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
