"""The trainer's end of the W&B process: starts it, tells it how the run ended, and never waits long for it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftdist.core import snapshot
from sftdist.core.figures import METRICS, WATCHED
from sftdist.core.settings import TrainConfig
from sftdist.core.storage import read_json

MODULE = "sftdist.training.wandb_sink"
SPEC = "log/wandb.json"
LOG = "log/wandb.log"
WATCHED_MARK = "log/wandb-watched.json"
KEPT_OFFLINE = 3  # exit code of the W&B process: online was asked for, the run was kept offline


@dataclass(frozen=True, kw_only=True)
class WandbSpec:
    """What the W&B process is told.

    `mode` None means online with a key, else offline; `offset` is where in the file `metrics` this process starts.
    `watched`: the lines of a watch over the run's checkpoints, which may come later; how far they were logged is in the
    file `watched_mark`.
    """

    mode: str | None
    project: str
    entity: str | None
    group: str | None
    tags: Sequence[str]
    name: str
    run_id: str
    notes: str
    config: dict[str, Any]
    folder: str
    metrics: str
    offset: int
    watched: str
    watched_mark: str
    parent: int
    init_seconds: float
    close_seconds: float


class WandbProcess:
    """A sink whose lines travel through `metrics.jsonl`; it only looks whether the process still lives.

    `say` prints one line to the console. A process that fails costs that one line and nothing else.
    """

    def __init__(self, spec: WandbSpec, run_dir: Path, say: Callable[[str], None]) -> None:
        self._log, self._say, self._spec = run_dir / LOG, say, spec
        self._log.parent.mkdir(parents=True, exist_ok=True)
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        file = run_dir / SPEC
        file.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(file)],
                env={"WANDB_ERROR_REPORTING": "false", **os.environ},  # else wandb sends usage figures, offline too
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals to the trainer's group are not for it
            )
        self._told = False

    def line(self, line: Mapping[str, Any]) -> None:
        if not self._told and self._child.poll() is not None:
            self._tell(f"W&B stopped ({self._last_words()}); training goes on; {self._kept()}")

    def close(self, state: str) -> None:
        """Tell the process that the run ended `done`, `preempted` or `failed`, and wait `close_seconds` at most.

        After a failure nobody waits: the other ranks have to hear of it. The process ends by itself.
        """
        if state == "failed":
            self._leave_alone(state)
            return
        try:
            self._child.communicate(f"{state}\n".encode(), timeout=self._spec.close_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._tell(f"W&B did not finish in {self._spec.close_seconds:g} s and was stopped; {self._kept()}")
            return
        if self._child.returncode == 0:
            return
        if self._child.returncode == KEPT_OFFLINE:
            self._tell(f"{self._last_words()}; {self._kept()}")
        else:
            self._tell(f"W&B failed ({self._last_words()}); {self._kept()}")

    def _leave_alone(self, state: str) -> None:
        assert self._child.stdin is not None, "it was started with a pipe"
        with suppress(BrokenPipeError), self._child.stdin as pipe:
            pipe.write(f"{state}\n".encode())

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._say(text)

    def _kept(self) -> str:
        runs = f"{self._spec.folder}/wandb/*run-*-{self._spec.run_id}"
        return f"metrics.jsonl has every figure, and `wandb sync {runs}` uploads what W&B kept"

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        return f"{last}, see {self._log}"


def wandb_id(run_name: str) -> str:
    """The stable id of a run name: the name itself where wandb takes it, else its plain characters and a hash."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", run_name)
    if plain == run_name and len(plain) <= 64:
        return plain
    return f"{plain[:50]}-{hashlib.sha256(run_name.encode()).hexdigest()[:8]}"


def has_unlogged(run_dir: Path) -> bool:
    """Whether a watch has found something that no W&B process has logged yet."""
    found, mark = run_dir / WATCHED, run_dir / WATCHED_MARK
    logged = read_json(mark)["bytes"] if mark.is_file() else 0
    return found.is_file() and found.stat().st_size > logged


def open_wandb(
    run_dir: Path,
    *,
    mode: str | None,
    project: str,
    entity: str | None,
    group: str | None,
    tags: Sequence[str],
    name: str,
    notes: str,
    config: Mapping[str, Any],
    say: Callable[[str], None] = print,
    init_seconds: float = 30.0,
    close_seconds: float = 20.0,
) -> list[WandbProcess]:
    """The W&B follower of a run, none if it is `disabled`; call it after `open_tracker`.

    `mode` is online, offline or disabled; None leaves it to WANDB_MODE, and without that to whether there is a key.
    """
    metrics = run_dir / METRICS
    mode = mode or os.environ.get("WANDB_MODE")
    if mode == "disabled":
        return []
    spec = WandbSpec(
        mode=mode,
        project=project,
        entity=entity,
        group=group,
        tags=list(tags),
        name=name,
        run_id=wandb_id(name),
        notes=notes,
        config=dict(config),
        folder=str(run_dir.resolve()),
        metrics=str(metrics.resolve()),
        offset=metrics.stat().st_size,
        watched=str((run_dir / WATCHED).resolve()),
        watched_mark=str((run_dir / WATCHED_MARK).resolve()),
        parent=os.getpid(),
        init_seconds=init_seconds,
        close_seconds=close_seconds,
    )
    return [WandbProcess(spec, run_dir, say)]


def wandb_of(cfg: TrainConfig, run_dir: Path, say: Callable[[str], None]) -> list[WandbProcess]:
    """The W&B follower that a run's configuration asks for."""
    tracking = cfg.tracking
    return open_wandb(
        run_dir,
        mode=tracking.wandb,
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=tracking.tags,
        name=str(cfg.run.name),
        notes=cfg.run.note,
        config=snapshot.to_dict(cfg),
        say=say,
    )
