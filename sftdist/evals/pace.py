"""How far the answers are: a bar with prompts per second on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sftdist.core.ranklog import Copied, takes_bar

EVERY_SECONDS = 10.0  # between two plain lines


class Pace:
    """Prompts per second and the time left; answers that were known when it began count for nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: tuple[float, int] | None = None

    def words(self, done: int, total: int) -> str:
        """`3.1 prompts/s, left 0:00:42`, or how many the cache knew as long as nothing was asked."""
        self._start = began, known = self._start or (self._clock(), done)
        seconds, asked = self._clock() - began, done - known
        if not asked or seconds <= 0:
            return f"{known} known from before"
        left = timedelta(seconds=round((total - done) * seconds / asked))
        return f"{asked / seconds:.1f} prompts/s, left {left}"


@contextmanager
def shown(label: str, *, is_main: bool = True) -> Iterator[Callable[[int, int], None]]:
    """What `answers` takes as `progress`, for the length of a block; silent on the ranks that are not the main one.

    `label` names who is asked, such as `tuned`.
    """
    if not is_main:
        yield silent
    elif not takes_bar(sys.stdout):
        yield _lines(label)
    else:
        out = sys.stdout.console if isinstance(sys.stdout, Copied) else sys.stdout
        yield from _bar(label, Console(file=out))


def _bar(label: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[words]}")
    pace = Pace()
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        console.show_cursor(True)  # a rank that is killed could not give it back
        task = progress.add_task(label, total=None, words="")
        yield lambda done, total: progress.update(task, completed=done, total=total, words=pace.words(done, total))


def _lines(label: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    pace, last = Pace(clock), -EVERY_SECONDS

    def tell(done: int, total: int) -> None:
        nonlocal last
        if clock() - last >= EVERY_SECONDS or done == total:
            last = clock()
            print(f"{label}: {done}/{total} answers, {pace.words(done, total)}", flush=True)
        else:
            pace.words(done, total)

    return tell


def silent(done: int, total: int) -> None:
    """Tells nobody: what the other ranks take."""
