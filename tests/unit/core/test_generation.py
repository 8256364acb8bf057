"""The ranks of one start agree before they use a key, whatever earlier starts have left in the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection

import pytest
from torch.distributed import TCPStore

from sftdist.core.distributed import session, share_text
from sftdist.core.errors import StartupError
from sftdist.core.generation import Generation
from tests.ranks import context, rank_environment

SECONDS = 20.0


class Starts:
    """Ranks as threads, each with a store connection of its own."""

    def __init__(self, store: TCPStore, pool: ThreadPoolExecutor) -> None:
        self._port = store.port
        self._pool = pool

    def rank(self, rank: int, size: int, seconds: float = SECONDS) -> Future[int]:
        store = TCPStore("127.0.0.1", self._port, wait_for_workers=False)
        return self._pool.submit(Generation(store, rank, size).number, seconds)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def starts(store: TCPStore) -> Iterator[Starts]:
    with ThreadPoolExecutor() as pool:
        yield Starts(store, pool)


def numbers(futures: list[Future[int]]) -> set[int]:
    return {future.result(SECONDS) for future in futures}


def test_every_start_has_a_number_of_its_own(starts: Starts) -> None:
    for expected in (1, 2, 3):
        assert numbers([starts.rank(rank, 3) for rank in (2, 1, 0)]) == {expected}
    assert starts.rank(0, 1).result(SECONDS) == 4, "one process waits for nobody"


def test_the_answer_of_a_dead_process_is_replaced(starts: Starts) -> None:
    first = starts.rank(0, 3)
    with pytest.raises(StartupError, match="rank 1 waited 0 s for the start from rank 0"):
        starts.rank(1, 3, 0.3).result()
    again = starts.rank(1, 3)
    assert not wait([first, again], 0.3).done
    assert numbers([first, again, starts.rank(2, 3)]) == {1}


def test_a_waiting_process_follows_the_rank_0_that_comes_last(starts: Starts) -> None:
    with pytest.raises(StartupError, match="rank 0 waited 0 s for rank 1 to start"):
        starts.rank(0, 3, 0.3).result()
    others = [starts.rank(1, 3), starts.rank(2, 3)]
    assert not wait(others, 0.3).done
    assert numbers([*others, starts.rank(0, 3)]) == {2}


def test_nobody_joins_a_group_that_is_complete(starts: Starts) -> None:
    """Its rank 0 on another host may still be ending when a rank has been started again here."""
    assert numbers([starts.rank(0, 2), starts.rank(1, 2)]) == {1}
    late = starts.rank(1, 2)
    assert not wait([late], 0.5).done
    assert numbers([starts.rank(0, 2), late]) == {2}


def _shares(send: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    text = share_text("greeting", environment["START"] if environment["RANK"] == "0" else None, SECONDS)
    with session() as world:
        send.send((text, world.gather_objects(world.rank)))


@pytest.mark.timeout(240)
def test_hosts_that_count_their_restarts_differently_share_the_text_and_the_group(store: TCPStore) -> None:
    """Only the torchrun whose rank fails counts a restart, and a change of membership is counted by none."""
    for start, counts in enumerate([(0, 0), (1, 0), (1, 0)]):
        pipes, processes = [], []
        for rank, count in enumerate(counts):
            receive, send = context.Pipe(duplex=False)
            own = {"TORCHELASTIC_RESTART_COUNT": str(count), "START": f"start {start}"}
            here = {**rank_environment(rank, 2, store.port), **own}
            processes.append(context.Process(target=_shares, args=(send, here), daemon=True))
            processes[-1].start()
            send.close()
            pipes.append(receive)
        try:
            assert [pipe.recv() for pipe in pipes if pipe.poll(60)] == [(f"start {start}", [0, 1])] * 2
        finally:
            for process in processes:
                process.join(10)
                process.kill()
