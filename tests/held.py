"""A fault that stops one rank before any one of the things that a save does to the disk."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch

from tests.faults import after_load, before_export, before_save, contents, say_and_stay

_DIRECTORY_ARGUMENT = {"os.mkdir": 2, "os.chmod": 2, "os.remove": 1, "os.rmdir": 1}


@dataclass(frozen=True)
class Operation:
    """`at`: seconds since the save began; `thread`: the name of the thread."""

    name: str
    at: float
    thread: str


@dataclass(frozen=True)
class Hold:
    """A fault: rank `rank` stops for ever before operation number `number` of its save of step `step`, and says
    "held"; the other ranks run on. Without `number` (or where there are fewer) every rank goes on to the export, says
    "trained" with the operations of that save, and stops there.

    Operations are what Python does to `checkpoints/` and `LATEST`, in whatever thread: a file is opened (to be
    written, hashed or flushed), a directory made, a name given or taken; and each file of safetensors twice, before it
    is written and when half of it is. Every rank says "resumed" with the step of the checkpoint that was loaded (0:
    none), and "begin" with what the run directory holds when the save begins.
    """

    run_dir: Path
    step: int
    rank: int = 0
    number: int | None = None

    def __call__(self, rank: int, pipe: Connection) -> None:
        watch = _Watch(self, pipe, rank == self.rank)
        watch.install()
        after_load(lambda step: pipe.send(("resumed", step)))
        before_save(watch.begin)
        before_export(lambda: say_and_stay(pipe, "trained", watch.seen))


class _Watch:
    def __init__(self, hold: Hold, pipe: Connection, mine: bool) -> None:
        self.seen: list[Operation] = []
        self._hold, self._pipe, self._mine = hold, pipe, mine
        self._saving, self._since = False, 0.0
        self._lock = threading.Lock()

    def begin(self, step: int) -> None:
        if step == self._hold.step:
            self._pipe.send(("begin", contents(self._hold.run_dir)))
        self._saving, self._since = step == self._hold.step, time.monotonic()

    def install(self) -> None:
        write = safetensors.torch.serialize_file

        def serialize_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            self._touched("write", path)
            if self._touched("half of", path, stop=False):
                write(tensors, path, metadata)
                os.truncate(path, Path(path).stat().st_size // 2)
                say_and_stay(self._pipe, "held", "half")
            write(tensors, path, metadata)

        safetensors.torch.serialize_file = serialize_file  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._saving:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self._touched("open", arguments[0])
        elif event == "os.rename":
            self._touched("rename", arguments[1])
        elif event in _DIRECTORY_ARGUMENT:
            self._touched(event.removeprefix("os."), arguments[0], arguments[_DIRECTORY_ARGUMENT[event]])

    def _touched(self, verb: str, path: Any, directory: int = -1, *, stop: bool = True) -> bool:
        """Count an operation on one of our paths; True (or no return) for the one to stop at."""
        folder = Path(f"/proc/self/fd/{directory}").readlink() if directory >= 0 else Path.cwd()
        place = folder / os.fsdecode(path)
        root = self._hold.run_dir.absolute()
        if not self._saving or not place.is_relative_to(root):
            return False
        name = place.relative_to(root).as_posix()
        if not name.startswith(("checkpoints", "LATEST", ".LATEST")):
            return False
        with self._lock:
            operation = Operation(f"{verb} {_plain(name)}", time.monotonic() - self._since, _thread())
            self.seen.append(operation)
            here = self._mine and len(self.seen) - 1 == self._hold.number
        if here and stop:
            say_and_stay(self._pipe, "held", operation.name)
        return here


def _thread() -> str:
    return threading.current_thread().name


def _plain(name: str) -> str:
    """Without what changes from save to save: the step, and the host, process and random word of a temporary name."""
    return re.sub(r"step-\d+", "step", re.sub(r"\.@[^/]*\.tmp|\.[0-9a-f]{8}\.tmp", ".tmp", name))
