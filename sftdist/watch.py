"""`sftdist evaluate watch=true run.dir=R`: what a watch over a run's checkpoints needs of that run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sftdist.core import agent, snapshot
from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.figures import REPORTS
from sftdist.core.lock import RunLock, holder
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
_ONE_WATCH = "One watch at a time may score a run: wait for it, or stop it."


def watch_run(
    run_dir: Path, world: World, score: Callable[[Path, int], EvalReport], *, seconds: float, say: Callable[[str], None]
) -> int:
    """Score every checkpoint of a run until it is over, and log what was found into its W&B run; how many were scored.

    `score(folder, step)` evaluates an exported checkpoint and is collective, as this is; `say` prints on rank 0.
    Raises StartupError where another process watches the run.
    """
    cfg = snapshot.read_config(run_dir)
    follows = cfg.checkpoint.best if cfg.checkpoint.best != EVAL_LOSS else None
    run = WatchedRun(
        run_dir, partial(steps_in, run_dir / FOLDER), partial(is_over, run_dir), partial(exported, run_dir), follows
    )
    if not world.is_main:
        return watch(run, world, score, seconds=seconds, say=say)
    with RunLock(run_dir / REPORTS, wait_seconds=0.0, advice=_ONE_WATCH):  # the run sees by it that it is watched
        clear_export(run_dir)
        scored = watch(run, world, score, seconds=seconds, say=say)
    # While it trained, the run's own W&B process has logged what it found: two at a time would cut each other off.
    for follower in wandb_of(cfg, run_dir, say) if has_unlogged(run_dir) else []:
        follower.close("done")
    return scored


def is_over(run_dir: Path) -> bool:
    """Whether a run has ended well and let go of its directory. One that failed or was preempted may go on."""
    status = agent.read_status(run_dir)
    return status is not None and status["state"] == "done" and holder(run_dir) is None


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
