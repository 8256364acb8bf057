"""The console of a run: a progress bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sftdist.training.tracking import Sink

SMOOTHING = 0.1  # of the step time, for the time left
EVERY_SECONDS = 10.0
FIRST_LINES = 5


class ProgressConsole:
    """A bar with loss, learning rate, tokens per second and time left; evaluations are printed above it."""

    def __init__(self, total_steps: int, *, first_step: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, figures="")
        self._progress.start()

    def line(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "train":
            self._progress.update(self._task, completed=line["step"], figures=train_figures(line))
        else:
            self._progress.console.print(other_line(line), markup=False, highlight=False)

    def close(self, state: str) -> None:
        self._progress.stop()


class PlainConsole:
    """Lines at a rate that a log file can bear: the first steps, one in ten seconds, the last, every evaluation."""

    def __init__(
        self,
        total_steps: int,
        *,
        out: TextIO,
        every_seconds: float = EVERY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._out, self._every, self._clock = total_steps, out, every_seconds, clock
        self._last_print = -every_seconds
        self._lines = 0
        self._step_seconds: float | None = None

    def line(self, line: Mapping[str, Any]) -> None:
        if line["kind"] != "train":
            self._print(other_line(line))
            return
        self._step_seconds = smoothed(self._step_seconds, line["step_seconds"])
        now = self._clock()
        self._lines += 1
        if self._lines > FIRST_LINES and now - self._last_print < self._every and line["step"] != self._total:
            return
        self._last_print = now
        left = timedelta(seconds=round((self._total - line["step"]) * self._step_seconds))
        self._print(f"step {line['step']}/{self._total}  {train_figures(line)}  left {left}")

    def close(self, state: str) -> None:
        self._out.flush()

    def _print(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def open_console(total_steps: int, *, first_step: int, out: TextIO = sys.stdout) -> Sink:
    """The bar where `out` is a terminal, plain lines elsewhere; `first_step` steps are done already."""
    console = Console(file=out)
    if console.is_terminal and not console.is_dumb_terminal:
        return ProgressConsole(total_steps, first_step=first_step, console=console)
    return PlainConsole(total_steps, out=out)


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
