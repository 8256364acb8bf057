"""Run a function on N gloo ranks, each a fresh fork of one warm process that has the heavy imports done."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

from sftdist.core.distributed import session

# A fork of a process that has run torch's thread pool can hang; the fork server imports and computes nothing.
context = multiprocessing.get_context("forkserver")
# The last one is imported by every ZeRO engine, and the compiler with it: more time than a test's own work.
context.set_forkserver_preload(
    ["torch", "transformers", "deepspeed", "sftdist.train", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


class RankError(AssertionError):
    """A rank raised, died or did not end in time; carries the first failing rank's traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(world, *args)` on `world_size` processes inside `session()`; the results in order of rank.

    `fn` is a module-level function, its arguments and its result can be pickled. Ranks see what torchrun's
    workers see: RANK, WORLD_SIZE, LOCAL_RANK, and a store at MASTER_ADDR:MASTER_PORT that outlives them.
    Raises RankError with the first failing rank's traceback; all ranks are ended then, and after `timeout` seconds.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        here = rank_environment(rank, world_size, store.port)
        process = context.Process(target=_rank_main, args=(send, here, fn, args), daemon=True)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    try:
        return _collect(pipes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank, with the rendezvous store at `port` of this host."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }


def _rank_main(send: Connection, environment: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        with session() as world:
            result = fn(world, *args)
        send.send((True, result))
    except BaseException:
        send.send((False, traceback.format_exc()))
        raise


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankError(f"ranks {late} did not end within {timeout} seconds")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipes[rank].recv()
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if not ok:
                raise RankError(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]
