"""`train.profile=[10,12]`: a trace of these optimizer steps by torch's profiler, one file per rank, and a short table.

The profiler listens to what is called and how long it takes; it changes no number. So the trained weights are those of
a run without it, bit by bit, and the key is no part of the configuration that names a run: give it on a resume, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function

from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError
from sftdist.core.storage import write_text
from sftdist.core.table import columns

SHOWN = 12  # operators of the table
STEP = "step"  # the label of a whole step in the trace, before its number
PASSES, UPDATE = "forward and backward", "update of the weights"  # its parts
_NAME_WIDTH = 60


class Profile:
    """Listens from the first of its steps to the last; without steps it does nothing.

    Around the loop it is a context: a run that is stopped in between leaves the trace of the steps so far, one that
    fails leaves none, for nothing may stand in the way of its error.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, world: World, say: Callable[[str], None]) -> None:
        self._steps, self._folder, self._world, self._say = steps, folder, world, say
        self._running: Any = None
        self._label: Any = None
        self._taken: list[int] = []

    def begin(self, step: int) -> None:
        """Before an optimizer step, counted from 1, is tried."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            return
        if self._running is None:
            cuda = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
            self._running = profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)
            self._running.start()
        self._label = record_function(f"{STEP} {step}")
        self._label.__enter__()

    def end(self, step: int) -> None:
        """After its weights are updated."""
        if self._running is None or self._steps is None:
            return
        if self._world.device.type == "cuda":  # what was asked of the device in this step belongs to it
            torch.cuda.synchronize(self._world.device)
        self._label.__exit__(None, None, None)
        self._taken.append(step)
        if step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace of the steps so far, where there are any."""
        if self._running is None:
            return
        self._world.progress.note("writing the trace of train.profile")
        running, self._running = self._running, None
        running.stop()
        first, last = self._taken[0], self._taken[-1]
        trace, table = files_of(self._folder, self._world.rank, first, last)
        trace.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(trace))
        lines = table_lines(running.key_averages(), self._taken)
        write_text(table, "\n".join(lines) + "\n")
        self._say(f"train.profile: {trace} (open it at ui.perfetto.dev), one for each rank; the table is in {table}")
        for line in lines:
            self._say(f"  {line}")

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._running is not None:
            running, self._running = self._running, None
            running.stop()


def files_of(run_dir: Path, rank: int, first: int, last: int) -> tuple[Path, Path]:
    """The trace of a rank and its table."""
    name = f"profile-rank{rank}-steps-{first}-{last}"
    return run_dir / "log" / f"{name}.json.gz", run_dir / "log" / f"{name}.txt"


def profile_of(
    steps: Sequence[int], planned: int, taken: int, run_dir: Path, world: World, say: Callable[[str], None]
) -> Profile:
    """What a run's loop tells of its steps. `planned`: the last step of the run; `taken`: those of earlier starts.

    Raises ConfigError where the run has no such steps.
    """
    asked = (steps[0], steps[1]) if steps else None
    if asked is not None and asked[1] > planned:
        raise ConfigError(
            f"train.profile: given [{asked[0]},{asked[1]}], required steps of the {planned} that this run takes"
        )
    if asked is not None and asked[0] <= taken:
        say(
            f"train.profile: steps {asked[0]} to {min(asked[1], taken)} were taken before this start, which begins "
            f"with step {taken + 1}"
        )
    return Profile(asked, run_dir, world, say)


def table_lines(events: EventList, steps: Sequence[int]) -> list[str]:
    """What the time of the steps went to: their own parts, then the operators by the time that they took themselves.

    On a GPU the times are the device's, else the processor's; milliseconds and shares of all operators' time.
    """
    marks = [event for event in events if event.key in (PASSES, UPDATE) or event.key.startswith(f"{STEP} ")]
    operators = [event for event in events if event not in marks and not event.is_user_annotation]
    on_device = any(event.self_device_time_total > 0 for event in operators)

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3

    place = "device" if on_device else "processor"
    whole = sum(own(event) for event in operators)
    shown = sorted(operators, key=own, reverse=True)[:SHOWN]
    parts = [event for event in marks if event.key in (PASSES, UPDATE) and event.cpu_time_total > 0]
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    total = sum(event.cpu_time_total for event in marks if event.key.startswith(f"{STEP} ")) / 1e3
    head = ("operator", "calls", "ms", "share")
    rows = [(one.key[:_NAME_WIDTH], f"{one.count:,}", f"{own(one):,.1f}", share(own(one), whole)) for one in shown]
    took = [f"{one.key} {one.cpu_time_total / 1e3:,.1f} ms ({share(one.cpu_time_total / 1e3, total)})" for one in parts]
    return [
        f"{span}: {', '.join([f'{total:,.1f} ms', *took])}; by operator, time of the {place}:",
        *(line.rstrip() for line in columns([head, *rows])),
    ]


def share(part: float, whole: float) -> str:
    """In percent; of nothing there is no share."""
    return f"{part / whole:.1%}" if whole else "-"
