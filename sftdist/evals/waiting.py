"""Work that rank 0 does by itself, for however long, while the other ranks wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sftdist.core.distributed import World

T = TypeVar("T")
Beat = Callable[[], None]
EVERY_SECONDS = 60.0  # far below the time that a collective or a watched rank may take


def quiet() -> None:
    """A beat that nobody waits for."""


def on_main(world: World, phase: str, work: Callable[[Beat], T], *, seconds: float = EVERY_SECONDS) -> T | None:
    """What `work` returns, on rank 0; None on the others, which wait. Collective.

    `work` calls what it is given again and again: that it gets on is told to the others every so many `seconds`, so
    that neither a collective nor the watch for ranks that hang ends it.
    """
    if not world.is_main:
        while world.all_reduce_max(0.0) < 1.0:
            world.progress.note("waiting for rank 0")
        return None
    told = time.monotonic()

    def beat() -> None:
        nonlocal told
        world.progress.note(phase)
        if time.monotonic() - told >= seconds:
            told = time.monotonic()
            world.all_reduce_max(0.0)

    made = work(beat)
    world.all_reduce_max(1.0)
    return made


def unbroken_on_main(world: World, phase: str, work: Callable[[], T], *, seconds: float = EVERY_SECONDS) -> T | None:
    """As `on_main`, for work that cannot say that it gets on, such as a copy or an upload: that rank 0 lives is told
    instead. `work` uses no collective."""

    def beating(beat: Beat) -> T:
        done = threading.Event()

        def repeat() -> None:
            while not done.wait(seconds):
                beat()

        with ThreadPoolExecutor(1) as pool:
            beats = pool.submit(repeat)
            try:
                made = work()
            finally:
                done.set()
            beats.result()
        return made

    return on_main(world, phase, beating, seconds=seconds)
