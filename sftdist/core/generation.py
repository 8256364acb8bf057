"""Which ranks belong together: a number for each start of the worker group, the same on all of its ranks.

The store outlives a restart, and torchrun tells the workers nothing that changes on all hosts alike with each start:
each agent counts its own restarts, a change of membership is not counted, and MASTER_PORT stays.
"""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

from sftdist.core.errors import StartupError

POLL_SECONDS = 0.1
_CALL = "sftdist/generation"


class Generation:
    """The agreement of the `size` processes of one start, over a store that keeps the keys of earlier starts.

    Rank 0 calls a new number. The others answer the newest call with an id of their process, and rank 0 says whose
    answers it took. Only a process that finds its own id there belongs to the generation, and every rank 0 says it
    once: so nobody joins a group that is complete and about to die, and the answer of a dead process can be replaced
    until then.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._number: int | None = None

    def number(self, seconds: float, awaited: str = "the start") -> int:
        """The number, from 1 on, the same on every rank; the first use waits for all ranks.

        Raises StartupError after `seconds` without an agreement; a rank other than 0 says then what it `awaited`.
        """
        if self._number is None:
            deadline = time.monotonic() + seconds
            if self._rank == 0:
                self._number = self._call(seconds, deadline)
            else:
                self._number = self._answer(seconds, deadline, awaited)
        return self._number

    def _call(self, seconds: float, deadline: float) -> int:
        number = self._store.add(_CALL, 1)
        answers = [_answer_key(number, rank) for rank in range(1, self._size)]
        for rank, answer in enumerate(answers, 1):
            while not self._store.check([answer]):
                if time.monotonic() > deadline:
                    raise StartupError(
                        f"rank 0 waited {seconds:.0f} s for rank {rank} to start. "
                        f"Rank {rank} has stopped or is slow to start: its own log says why."
                    )
                time.sleep(POLL_SECONDS)
        members = [self._store.get(key).decode("utf-8") for key in answers]
        self._store.set(_members_key(number), json.dumps(members))
        return number

    def _answer(self, seconds: float, deadline: float, awaited: str) -> int:
        me, answered = uuid.uuid4().hex, 0
        while time.monotonic() <= deadline:
            number = self._store.add(_CALL, 0)
            if number != answered:  # another rank 0 has come
                self._store.set(_answer_key(number, self._rank), me)
                answered = number
            if self._store.check([_members_key(number)]) and me in json.loads(self._store.get(_members_key(number))):
                return number
            time.sleep(POLL_SECONDS)
        raise no_word(self._rank, seconds, awaited)


def no_word(rank: int, seconds: float, awaited: str) -> StartupError:
    """The error of a rank that waited in vain for rank 0."""
    return StartupError(
        f"rank {rank} waited {seconds:.0f} s for {awaited} from rank 0 and got nothing. "
        "Rank 0 has stopped or is slow to start: its own log says why."
    )


def _answer_key(number: int, rank: int) -> str:
    return f"{_CALL}/{number}/answer/{rank}"


def _members_key(number: int) -> str:
    return f"{_CALL}/{number}/members"
