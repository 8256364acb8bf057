"""Score each checkpoint of a run as it appears, in a job of its own; the run may train meanwhile, or be over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.figures import BETTER, WATCHED, watched
from sftdist.core.storage import append_jsonl
from sftdist.evals.report import EvalReport


@dataclass(frozen=True)
class WatchedRun:
    """A run, as one who only looks at it sees it.

    `steps` lists its whole checkpoints. `over` says that no more will come. `exported(step)` is the model of one, for
    the length of a block; raises CheckpointError where there is none. `follows`: the metric that tells the run's best
    checkpoint, where that is one of ours. Only rank 0 calls these.
    """

    folder: Path
    steps: Callable[[], Iterable[int]]
    over: Callable[[], bool]
    exported: Callable[[int], AbstractContextManager[Path]]
    follows: str | None = None


def watch(
    run: WatchedRun,
    world: World,
    score: Callable[[Path, int], EvalReport],
    *,
    seconds: float,
    say: Callable[[str], None],
) -> int:
    """Score the checkpoints in their order until the run is over; how many were scored. Collective, as `score` is.

    A line for each goes to `report/watch.jsonl`; those that are there are not scored again. A checkpoint that cannot be
    exported is passed over, with a word. `seconds`: between two looks. Raises ConfigError where `run.follows` is none
    of the metrics.
    """
    done = {line["step"] for line in watched(run.folder)} if world.is_main else set()
    scored = 0
    while True:
        world.progress.note("watching")
        over = world.is_main and run.over()  # asked before the steps are listed: the last one is among them
        step = next((step for step in sorted(run.steps()) if step not in done), None) if world.is_main else None
        step, over = world.broadcast_object((step, over))
        if step is not None:
            done.add(step)
            scored += _score(run, world, score, step, say)
        elif over:
            return scored
        else:
            time.sleep(seconds)


def line_of(step: int, report: EvalReport) -> dict[str, Any]:
    """A line of `report/watch.jsonl`: the tuned model's mean of each metric, and whether higher is better."""
    values = {name: float(np.average(found.tuned, weights=found.weights)) for name, found in report.metrics.items()}
    figures = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
    better = {name: found.higher_is_better for name, found in report.metrics.items()}
    return {"kind": "probe", "step": step, **figures, BETTER: better}


def _score(
    run: WatchedRun, world: World, score: Callable[[Path, int], EvalReport], step: int, say: Callable[[str], None]
) -> bool:
    """Export, evaluate and write down one checkpoint; False where it could not be exported."""
    if not world.is_main:
        folder = world.broadcast_object(None)
        if folder is not None:
            score(folder, step)
            world.barrier()
        return folder is not None
    began, told = time.monotonic(), False
    try:
        with run.exported(step) as folder:
            told = True
            world.broadcast_object(folder)
            line = line_of(step, score(folder, step))
            world.barrier()  # the others have done with the folder
    except CheckpointError as problem:
        if told:
            raise
        world.broadcast_object(None)
        say(f"step {step} is passed over: {problem}")
        return False
    _require_followed(run.follows, line)
    (run.folder / WATCHED).parent.mkdir(exist_ok=True)
    append_jsonl(run.folder / WATCHED, [line])
    value = "" if run.follows is None else f", {run.follows} {line[run.follows]:.4f}"
    say(f"step {step}: {len(line[BETTER])} metrics in {time.monotonic() - began:.0f} s{value}")
    return True


def _require_followed(metric: str | None, line: dict[str, Any]) -> None:
    """Raises ConfigError where checkpoints cannot be told apart by this metric: none of them would be the best."""
    if metric is None or line[BETTER].get(metric) is not None:
        return
    usable = sorted(name for name, higher in line[BETTER].items() if higher is not None)
    near = ", ".join(get_close_matches(metric, usable) or usable[:10])
    raise ConfigError(f"checkpoint.best: given {metric}, required a metric that can be better or worse, such as {near}")
