"""The console of a run: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from sftdist.core.ranklog import Copied, plain, takes_bar
from sftdist.training.tracking import Sink

SMOOTHING = 0.1  # of the step time, for the time left
EVERY_SECONDS = 10.0
FIRST_LINES = 5


class Out(Protocol):
    """Where plain lines go."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...


class Pace:
    """The time left, from the smoothed time of a step: rich's own needs two steps within half a minute."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._step_seconds: float | None = None

    def left(self, line: Mapping[str, Any]) -> timedelta:
        """After a training line."""
        self._step_seconds = smoothed(self._step_seconds, line["step_seconds"])
        return timedelta(seconds=round((self._total - line["step"]) * self._step_seconds))


class Above:
    """Prints whole lines above a progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""

    def write(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        if whole:
            # The terminal breaks a long line itself: a path stays one word to whoever copies it.
            said = "\n".join(map(plain, whole))
            self._console.print(said, markup=False, highlight=False, emoji=False, soft_wrap=True)


class Narrower:
    """Something without the last columns of the terminal: in a full line, the ^C that a person types begins another."""

    def __init__(self, shown: RenderableType) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._shown, options.update_width(options.max_width - len("^C ")))


class Bar(Progress):
    """A progress bar that leaves room for what a person types."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from map(Narrower, super().get_renderables())


class ProgressConsole:
    """A bar with loss, learning rate, tokens per second and time left. What others print meanwhile, and evaluations,
    stand above it."""

    def __init__(self, total_steps: int, *, first_step: int, console: Console) -> None:
        # The streams of a rank are copied to its log: they are told to print above. Others are rich's to replace.
        self._streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Copied)]
        self._above = Above(console)
        self._pace = Pace(total_steps)
        self._progress = Bar(
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=2,
            expand=True,
            redirect_stdout=not self._streams,
            redirect_stderr=not self._streams,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, figures="")
        self._progress.start()
        # A rank that is killed cannot give the cursor back: so it is never taken.
        console.show_cursor(True)
        for stream in self._streams:
            stream.show = self._above.write

    def line(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "train":
            figures = f"{train_figures(line)}  left {self._pace.left(line)}"
            self._progress.update(self._task, completed=line["step"], figures=figures)
        else:
            self._above.write(other_line(line) + "\n")

    def close(self, state: str) -> None:
        for stream in self._streams:
            stream.show = stream.console.write
        self._progress.stop()


class PlainConsole:
    """Lines at a rate that a log file can bear: the first steps, one in ten seconds, the last, every evaluation."""

    def __init__(
        self,
        total_steps: int,
        *,
        out: Out,
        every_seconds: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._out, self._every, self._clock = total_steps, out, every_seconds, clock
        self._last_print = -every_seconds
        self._lines = 0
        self._pace = Pace(total_steps)

    def line(self, line: Mapping[str, Any]) -> None:
        if line["kind"] != "train":
            self._print(other_line(line))
            return
        left = self._pace.left(line)
        now = self._clock()
        self._lines += 1
        if self._lines > FIRST_LINES and now - self._last_print < self._every and line["step"] != self._total:
            return
        self._last_print = now
        self._print(f"step {line['step']}/{self._total}  {train_figures(line)}  left {left}")

    def close(self, state: str) -> None:
        self._out.flush()

    def _print(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def open_console(total_steps: int, *, first_step: int) -> list[Sink]:
    """The bar where standard output is a terminal, and plain lines in the rank's log beside it; elsewhere plain lines.
    `first_step` steps are done already."""
    out: TextIO | Copied = sys.stdout
    if not takes_bar(out):
        return [PlainConsole(total_steps, out=out)]
    if not isinstance(out, Copied):
        return [ProgressConsole(total_steps, first_step=first_step, console=Console(file=out))]
    log = PlainConsole(total_steps, out=out.log)
    return [ProgressConsole(total_steps, first_step=first_step, console=Console(file=out.console)), log]


def smoothed(average: float | None, seconds: float) -> float:
    """Exponential mean, so that the time left follows a machine that changes its pace."""
    return seconds if average is None else average + SMOOTHING * (seconds - average)


def train_figures(line: Mapping[str, Any]) -> str:
    return f"loss {line['loss']:.4f}  lr {line['lr']:.3g}  {line['tokens_per_second']:,.0f} tokens/s"


def other_line(line: Mapping[str, Any]) -> str:
    """`eval at step 100: loss 2.3100  domain 1.9000`: the line's figures, without the prefix they share."""
    kind = line["kind"]
    at = f" at step {line['step']}" if "step" in line else ""
    figures = (
        f"{key.removeprefix(f'{kind}/').removeprefix('loss/')} {_figure(value)}"
        for key, value in line.items()
        if key not in ("kind", "step")
    )
    return f"{kind}{at}: {'  '.join(figures)}"


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
