"""`sftdist evaluate watch=true run.dir=R`: what a watch over a run's checkpoints needs of that run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sftdist.core import agent, snapshot
from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.figures import REPORTS
from sftdist.core.lock import RunLock, holder
from sftdist.core.progress import LastChange
from sftdist.core.settings import LaunchSettings
from sftdist.core.storage import remove_path, write_text
from sftdist.core.words import word
from sftdist.evals.report import EvalReport
from sftdist.evals.watch import WatchedRun, watch
from sftdist.training.checkpoint_files import FOLDER, directory_name, steps_in
from sftdist.training.export_proof import plain_environment
from sftdist.training.retention import EVAL_LOSS
from sftdist.training.wandb_process import has_unlogged, wandb_of

_EXPORT = "sftdist.commands.export"
_OWN_EXPORT = "watched-export"  # in the folder of reports: names the export that is under way
_SIGNS_OF_LIFE = (agent.STATUS, "metrics.jsonl")  # also seen where a file system keeps locks to each host
_ENDED = {"failed": "has failed", "preempted": "was preempted, and did not go on"}
_ONE_WATCH = "One watch at a time may score a run: wait for it, or stop it."


@dataclass(frozen=True)
class Watched:
    """How many checkpoints were scored; how the run has ended: its exit code, and why where that is not 0. Rank 0 alone
    knows the latter."""

    scored: int
    code: int = agent.DONE
    reason: str = ""


def watch_run(
    run_dir: Path, world: World, score: Callable[[Path, int], EvalReport], *, seconds: float, say: Callable[[str], None]
) -> Watched:
    """Score every checkpoint of a run until it is over, and log what was found into its W&B run.

    `score(folder, step)` evaluates an exported checkpoint and is collective, as this is; `say` prints on rank 0.
    Raises StartupError where another process watches the run.
    """
    cfg = snapshot.read_config(run_dir)
    end = RunEnd(run_dir, cfg.launch)
    follows = cfg.checkpoint.best if cfg.checkpoint.best != EVAL_LOSS else None
    run = WatchedRun(run_dir, partial(steps_in, run_dir / FOLDER), end.is_over, partial(exported, run_dir), follows)
    if not world.is_main:
        return Watched(watch(run, world, score, seconds=seconds, say=say))
    with RunLock(run_dir / REPORTS, wait_seconds=0.0, advice=_ONE_WATCH):  # the run sees by it that it is watched
        clear_export(run_dir)
        scored = watch(run, world, score, seconds=seconds, say=say)
    # While it trained, the run's own W&B process has logged what it found: two at a time would cut each other off.
    for follower in wandb_of(cfg, run_dir, say) if has_unlogged(run_dir) else []:
        follower.close("done")
    return Watched(scored, end.code, end.reason)


class RunEnd:
    """Whether a run is over, looked at again and again, and how it has ended.

    One that failed or was preempted may be started again: it is over where nobody has its directory and nothing in it
    has changed for `launch.lost_seconds`, or, where it has not said that it failed, for `launch.hang_seconds`.
    """

    def __init__(self, run_dir: Path, launch: LaunchSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.code, self.reason = agent.DONE, ""
        self._run_dir, self._launch, self._clock = run_dir, launch, clock
        self._life = LastChange(clock())

    def is_over(self) -> bool:
        status, held = agent.read_status(self._run_dir), holder(self._run_dir) is not None
        state = "gone" if status is None else status["state"]
        quiet = self._life.age((held, status, *map(_changed, self._signs())), self._clock())
        if held:
            return False
        if state == "done":
            return True
        if quiet < (self._launch.lost_seconds if state == "failed" else self._launch.hang_seconds):
            return False
        self.code, self.reason = self._why(state, status)
        return True

    def _signs(self) -> list[Path]:
        return [self._run_dir / name for name in _SIGNS_OF_LIFE]

    def _why(self, state: str, status: dict[str, Any] | None) -> tuple[int, str]:
        if status is None or state == "running":
            seconds = self._launch.hang_seconds
            return agent.FAILED, f"{self._run_dir}: its process is gone, and nothing has changed for {seconds:g} s"
        at = "" if status["step"] is None else f" at step {status['step']}"
        why = "".join(f": {line}" for line in status["reason"].splitlines()[:1])
        return status["code"], f"{self._run_dir}: the run {_ENDED[state]}{at}{why}"


def _changed(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None


@contextmanager
def exported(run_dir: Path, step: int) -> Iterator[Path]:
    """A checkpoint's model, exported by a process of its own and removed afterwards; one that the user has exported is
    taken as it is, and stays. Raises CheckpointError where the checkpoint cannot be exported."""
    folder = export_folder(run_dir, step)
    if folder.is_dir():
        yield folder
        return
    write_text(run_dir / REPORTS / _OWN_EXPORT, folder.name)
    words = [word("run.dir", str(run_dir)), f"step={step}", "export.merge=true"]
    done = subprocess.run(
        [sys.executable, "-m", _EXPORT, *words], env=plain_environment(), capture_output=True, text=True, check=False
    )
    try:
        if done.returncode:
            raise CheckpointError(_reason(run_dir, step, done.stderr or done.stdout))
        yield folder
    finally:
        clear_export(run_dir)


def clear_export(run_dir: Path) -> None:
    """Remove the export of this watch, or what one before has left when it was killed."""
    mark = run_dir / REPORTS / _OWN_EXPORT
    if not mark.is_file():
        return
    folder = run_dir / mark.read_text(encoding="utf-8")
    if folder.is_dir():
        remove_path(folder)
    mark.unlink()


def export_folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"export-{directory_name(step)}"


def _reason(run_dir: Path, step: int, said: str) -> str:
    if not (run_dir / FOLDER / directory_name(step)).is_dir():
        return "its checkpoint was pruned before it could be scored; raise checkpoint.keep_last"
    return "; ".join(said.strip().splitlines()[-3:])
