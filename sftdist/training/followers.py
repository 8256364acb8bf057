"""The trainer's end of its trackers and hooks by import path: a process for each, for which it never waits long."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sftdist.core import snapshot
from sftdist.core.errors import ConfigError
from sftdist.core.extension import is_import_path, load_function, require_call
from sftdist.core.figures import METRICS
from sftdist.core.settings import TrainConfig
from sftdist.training.follow import CALLS, HOOKS, NEEDS, SINKS, FollowerSpec

MODULE = "sftdist.training.follow"
FORM = "a class or function (run_dir, config, step)"
CLOSE_SECONDS = {SINKS: 20.0, HOOKS: 120.0}  # at the end of a run; after a stop signal there is little time
STOPPED_SECONDS = 10.0


class Follower:
    """A sink whose lines travel through `metrics.jsonl`; it only looks whether its process still lives.

    `say` prints one line to the console. A process that fails costs that one line and nothing else.
    """

    def __init__(self, spec: FollowerSpec, run_dir: Path, say: Callable[[str], None]) -> None:
        name = re.sub(r"\W+", "-", spec.path)
        self._spec, self._say, self._told = spec, say, False
        self._log = run_dir / "log" / f"{name}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        file = self._log.with_suffix(".json")
        file.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(file)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals to the trainer's group are not for it
            )

    def line(self, line: Mapping[str, Any]) -> None:
        if not self._told and self._child.poll() is not None:
            self._tell(f"{self._name()} stopped ({self._last_words()}); training goes on")

    def close(self, state: str) -> None:
        """Tell the process that the run ended `done`, `preempted` or `failed`, and wait a while for it.

        After a failure nobody waits: the other ranks have to hear of it. The process ends by itself.
        """
        if state == "failed":
            assert self._child.stdin is not None, "it was started with a pipe"
            with suppress(BrokenPipeError), self._child.stdin as pipe:
                pipe.write(f"{state}\n".encode())
            return
        seconds = self._spec.close_seconds if state == "done" else STOPPED_SECONDS
        try:
            self._child.communicate(f"{state}\n".encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._tell(f"{self._name()} did not finish in {seconds:g} s and was stopped")
            return
        if self._child.returncode != 0:
            self._tell(f"{self._name()} failed ({self._last_words()})")

    def _name(self) -> str:
        return f"{self._spec.key}: {self._spec.path}"

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._say(f"{text}; metrics.jsonl has every figure")

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        return f"{last}, see {self._log}"


def followers_of(cfg: TrainConfig, run_dir: Path, step: int, say: Callable[[str], None]) -> list[Follower]:
    """A process for each tracker and hook; call it after `open_tracker`. `step`: the one that the run goes on from."""
    metrics = run_dir / METRICS
    specs = [
        FollowerSpec(
            key=key,
            path=path,
            run_dir=str(run_dir.resolve()),
            config=snapshot.to_dict(cfg),
            step=step,
            metrics=str(metrics.resolve()),
            offset=metrics.stat().st_size,
            parent=os.getpid(),
            close_seconds=CLOSE_SECONDS[key],
        )
        for key, path in _named(cfg)
    ]
    return [Follower(spec, run_dir, say) for spec in specs]


def require_followers(cfg: TrainConfig) -> None:
    """Raises ConfigError, all issues at once, for a tracker or hook that is not there or cannot be called."""
    issues: list[str] = []
    for key, path in _named(cfg):
        try:
            made = require_call(load_function(path, key), path, key, FORM, Path(), {}, 0)
            if isinstance(made, type) and not set(CALLS[key]) & set(dir(made)):
                raise ConfigError(f"{key}: given {path}, required a class with {NEEDS[key]}")
        except ConfigError as error:
            issues += error.issues
    if issues:
        raise ConfigError(issues)


def _named(cfg: TrainConfig) -> Iterator[tuple[str, str]]:
    """What is no import path, the rules of the configuration have said already."""
    for key, paths in ((SINKS, cfg.tracking.sinks), (HOOKS, cfg.train.hooks)):
        yield from ((key, path) for path in paths if is_import_path(path))
