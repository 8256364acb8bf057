"""The process of one tracker or hook of the user's own: it follows `metrics.jsonl` and hands on what it reads.

`python -m sftdist.training.follow FILE` is started by `sftdist.training.followers`; the file holds a `FollowerSpec` as
JSON. In a process of its own the user's code can be slow, hang, raise, or draw random numbers, and the training is the
same bit by bit. The file is the queue: nothing is dropped.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.core.extension import load_function
from sftdist.training.tail import Tail, final_state

SINKS, HOOKS = "tracking.sinks", "train.hooks"
CALLS = {SINKS: ("line",), HOOKS: ("after_step", "after_checkpoint")}  # a tracker has all of these, a hook some
CLOSE = "close"
NEEDS = {SINKS: "the method line(line)", HOOKS: "the method after_step(step, line) or after_checkpoint(step, folder)"}


@dataclass(frozen=True, kw_only=True)
class FollowerSpec:
    """What the process is told. `key`, `path`: what it runs; `step`: the run's when it started; `offset`: where in the
    file `metrics` it begins; `parent`: the trainer's process; `close_seconds`: for the end."""

    key: str
    path: str
    run_dir: str
    config: dict[str, Any]
    step: int
    metrics: str
    offset: int
    parent: int
    close_seconds: float


def main(spec: FollowerSpec) -> None:
    """Hand on every line and every checkpoint until the trainer says how it ended, or is gone."""
    own = made(spec)
    tail, published = Tail(Path(spec.metrics), spec.offset), Published(Path(spec.run_dir), spec.step)
    state = ""
    while not state:
        state = final_state(spec.parent)
        if state:
            signal.alarm(round(spec.close_seconds) + 1)  # the trainer may be gone, and the user's code stuck
        for line in tail.lines():
            give(spec.key, own, line)
        for step, folder in published.new() if hasattr(own, "after_checkpoint") else ():
            own.after_checkpoint(step, folder)
    if hasattr(own, CLOSE):
        own.close(state)


def made(spec: FollowerSpec) -> Any:
    """The user's object: `name(run_dir, config, step)`. Raises ConfigError where it has not what is called."""
    own = load_function(spec.path, spec.key)(Path(spec.run_dir), spec.config, spec.step)
    has = [name for name in CALLS[spec.key] if hasattr(own, name)]
    if not has:
        raise ConfigError(f"{spec.key}: {spec.path} made {type(own).__name__}, required {NEEDS[spec.key]}")
    return own


def give(key: str, own: Any, line: dict[str, Any]) -> None:
    """A tracker gets every line, a hook those of training steps."""
    if key == SINKS:
        own.line(line)
    elif line["kind"] == "train" and hasattr(own, "after_step"):
        own.after_step(line["step"], line)


class Published:
    """The checkpoints that have been published since the last look, the oldest first."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self._latest, self._folder, self._seen = run_dir / "LATEST", run_dir / "checkpoints", step

    def new(self) -> Iterator[tuple[int, Path]]:
        """Step and folder of each; one that was pruned before anybody looked is passed over."""
        if not self._latest.is_file():
            return
        newest = _step(self._latest.read_text(encoding="utf-8").strip())
        there = {_step(path.name): path for path in self._folder.glob("step-*") if path.name[5:].isdigit()}
        for step in sorted(step for step in there if self._seen < step <= newest):
            self._seen = step
            yield step, there[step]


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


if __name__ == "__main__":
    for ours in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ours, signal.SIG_IGN)  # they are for the trainer, whose last state reaches us by the pipe
    main(FollowerSpec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
