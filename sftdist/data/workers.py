"""The processes that make shards, each reading its own part of the input; they die with the one that started them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from sftdist.core.distributed import PARENT_VARIABLE, die_with_parent
from sftdist.core.errors import WorkerLostError
from sftdist.data.encode import Job
from sftdist.data.shards import StoredShard, Work, is_there, make_shard

AHEAD = 2  # shards waiting per worker: enough to keep it busy, few enough to bound memory

_jobs: Sequence[Job] = ()  # in a worker: the jobs of its pool, inherited by the fork and never pickled


class Workers:
    """Makes the shards of jobs; the processes are forked when the first large input needs them."""

    def __init__(self, jobs: Sequence[Job], count: int) -> None:
        self._jobs, self._count = jobs, count
        self._pool: ProcessPoolExecutor | None = None

    def make(self, works: Iterable[Work]) -> Iterator[StoredShard]:
        """Every shard, in order, once it is there; what an earlier process has finished is not made again."""
        if self._count == 1:
            yield from (self._made_here(work) for work in works)
            return
        try:
            yield from self._made_by_workers(works)
        except BrokenProcessPool as lost:
            raise WorkerLostError(
                "a worker of prepare was killed, most often because the machine ran out of memory; required are all of "
                "them: give fewer with data.workers, and run the same command again: it goes on from what is done"
            ) from lost

    def _made_by_workers(self, works: Iterable[Work]) -> Iterator[StoredShard]:
        waiting: deque[tuple[Work, Future[None] | None]] = deque()
        for work in works:
            waiting.append((work, None if is_there(work) else self._started().submit(_make_in_worker, work)))
            if len(waiting) >= self._count * (1 + AHEAD):
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())

    def _made_here(self, work: Work) -> StoredShard:
        if not is_there(work):
            make_shard(self._jobs[work.job], work)
        return StoredShard.open(work.file)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Fork: a worker needs the tokenizer and tables that are in memory here, at once.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_start_worker, initargs=(self._jobs,))
            with _one_tokenizer_thread():
                self._pool.submit(int).result()
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _done(work: Work, future: Future[None] | None) -> StoredShard:
    if future is not None:
        future.result()
    return StoredShard.open(work.file)


def _start_worker(jobs: Sequence[Job]) -> None:
    global _jobs
    gc.freeze()  # what was inherited is for ever: the collector need not walk it, nor unshare its pages
    gc.set_threshold(100_000, 20, 20)
    os.environ.pop(PARENT_VARIABLE, None)  # of the process that forked us, whose parent is another
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _jobs = jobs


def _make_in_worker(work: Work) -> None:
    make_shard(_jobs[work.job], work)


@contextmanager
def _one_tokenizer_thread() -> Iterator[None]:
    """The Rust tokenizer warns at a fork unless this is set; the parent gets its threads back afterwards."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
