"""The whole training program on forked ranks that a test may break, hold or kill, and what a run directory holds."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed import TCPStore

from sftdist import train
from sftdist.training.checkpoint import Checkpoints
from tests.ranks import context, rank_environment

Fault = Callable[[int, Connection], None]  # called in each rank before the program, with its rank and a pipe to us
Contents = dict[str, tuple[int, str]]  # size and sha256 by relative path


def no_fault(rank: int, pipe: Connection) -> None:
    """A sound rank."""


class Faults:
    """Several faults at once."""

    def __init__(self, *faults: Fault) -> None:
        self._faults = faults

    def __call__(self, rank: int, pipe: Connection) -> None:
        for fault in self._faults:
            fault(rank, pipe)


class Job:
    """`sftdist.train` on ranks of its own, as torchrun starts them; all of them are gone when the block ends."""

    def __init__(self, size: int, overrides: Sequence[str], home: Path, fault: Fault = no_fault) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._screens = [home / f"screen-{self._store.port}-{rank}" for rank in range(size)]
        self._pipes: list[Connection] = []
        self._ranks: list[BaseProcess] = []
        for rank, screen in enumerate(self._screens):
            mine, theirs = context.Pipe()
            environment = rank_environment(rank, size, self._store.port)
            arguments = (rank, environment, list(overrides), home, screen, theirs, fault)
            process = context.Process(target=_program, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._ranks.append(process)

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL to every rank; returns when all are gone."""
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()

    def codes(self, timeout: float = 90.0) -> list[int]:
        """Wait for every rank; their exit codes (negative: the signal that ended one)."""
        deadline = time.monotonic() + timeout
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self._ranks) if process.exitcode is None]
        assert not late, f"ranks {late} did not end within {timeout} seconds\n{self.screen()}"
        return [int(process.exitcode or 0) for process in self._ranks]

    def hear(self, rank: int, word: str, timeout: float = 60.0) -> Any:
        """What a rank says about `word`; what it says before that is passed over."""
        deadline = time.monotonic() + timeout
        try:
            while self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                said, value = self._pipes[rank].recv()
                if said == word:
                    return value
        except EOFError:
            raise AssertionError(f"rank {rank} ended without a word about {word!r}\n{self.screen()}") from None
        raise AssertionError(f"rank {rank} said nothing about {word!r} for {timeout} seconds\n{self.screen()}")

    def screen(self) -> str:
        """What the ranks have printed, rank 0 first."""
        return "".join(path.read_text(errors="replace") for path in self._screens if path.is_file())


def train_to_the_end(size: int, overrides: Sequence[str], home: Path, fault: Fault = no_fault) -> str:
    """The program where nothing ends it early; what it printed."""
    with Job(size, overrides, home, fault) as job:
        codes = job.codes()
        assert codes == [0] * size, f"exit codes {codes}\n{job.screen()}"
        return job.screen()


def _program(
    rank: int,
    environment: dict[str, str],
    overrides: list[str],
    home: Path,
    screen: Path,
    pipe: Connection,
    fault: Fault,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(home)
    descriptor = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.argv = ["sftdist.train", *overrides]
    fault(rank, pipe)
    sys.exit(train.main())


def contents(folder: Path, limits: Mapping[str, int] | None = None) -> Contents:
    """Every file below a folder, `limits`: how many bytes of which to look at. Files that vanish meanwhile are left
    out."""
    found: Contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        try:
            data = path.read_bytes()[: (limits or {}).get(name)]
        except (FileNotFoundError, IsADirectoryError):
            continue
        found[name] = len(data), hashlib.sha256(data).hexdigest()
    return found


def before_save(call: Callable[[int], None]) -> None:
    """Have this process call `call(step)` whenever it begins to save a checkpoint; the save before has ended then."""
    original = Checkpoints.save

    def save(self: Checkpoints, engine: Any, state: Mapping[str, Any], step: int) -> Path:
        self.wait()  # as the save itself does, first of all
        call(step)
        return original(self, engine, state, step)

    Checkpoints.save = save  # type: ignore[method-assign]


def after_save(call: Callable[[int], None]) -> None:
    """Have this process call `call(step)` whenever it has saved a checkpoint (in the background: has begun to)."""
    original = Checkpoints.save

    def save(self: Checkpoints, engine: Any, state: Mapping[str, Any], step: int) -> Path:
        path = original(self, engine, state, step)
        call(step)
        return path

    Checkpoints.save = save  # type: ignore[method-assign]


def after_load(call: Callable[[int], None]) -> None:
    """Have this process call `call(step)` when it has looked for a checkpoint; 0 where there was none."""
    original = Checkpoints.load_latest

    def load_latest(self: Checkpoints, engine: Any, say: Callable[[str], None] = print) -> dict[str, Any] | None:
        state = original(self, engine, say)
        call(state["checkpoint"]["step"] if state else 0)
        return state

    Checkpoints.load_latest = load_latest  # type: ignore[method-assign]


def before_export(call: Callable[[], None]) -> None:
    """Have this process call `call()` when it has trained to the end and is about to export."""
    original = train.export_model

    def export_model(*arguments: Any, **named: Any) -> Any:
        call()
        return original(*arguments, **named)

    train.export_model = export_model


def say_and_stay(pipe: Connection, word: str, value: Any = None) -> None:
    """Tell the test, which will kill this process; it does nothing any more."""
    pipe.send((word, value))
    threading.Event().wait()
