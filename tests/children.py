"""Small programs that tests start as processes of their own: `python -m tests.children VERB [ARGUMENT ...]`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sftdist.core import agent, config
from sftdist.core.distributed import StopSignal, die_with_parent, restart_count, session, share_text
from sftdist.core.errors import TrainingError
from sftdist.core.failure import ERROR, here, write_failure
from sftdist.core.grace import torchrun_grace
from sftdist.core.progress import Activity
from sftdist.core.settings import TrainConfig


def share(folder: str) -> None:
    """Every rank writes what rank 0 shared; the first attempt fails afterwards, so torchrun starts a second one."""
    mine = f"attempt {restart_count()}" if os.environ["RANK"] == "0" else None
    texts = [share_text("greeting", mine), share_text("greeting", mine and mine + " again")]
    name = f"{restart_count()}-{os.environ['RANK']}"
    Path(folder, name).write_text("|".join(texts))
    if restart_count() == 0:
        sys.exit(1)


def fail(how: str) -> None:
    """Rank 1 fails while rank 0 is busy with something that no collective ends."""
    StopSignal().install()  # torchrun sends TERM to the rest: a trainer takes it as "after this step"
    with session() as world:
        world.barrier()
        if world.rank == 1 and how == "raise":
            raise TrainingError("the loss of rank 1 is not finite")
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(120)


def once(folder: str) -> None:
    """Every rank notes each of its starts with what rank 0 shared in it; rank 1 is killed in its first."""
    rank = os.environ["RANK"]
    notes = Path(folder, rank)
    starts = len(notes.read_text().splitlines()) if notes.exists() else 0
    with notes.open("a") as file:
        file.write(share_text("start", f"start {starts}" if rank == "0" else None) + "\n")
    with session() as world:
        world.barrier()
        if rank == "1" and starts == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        world.barrier()
        Path(folder, f"done-{rank}").write_text(str(restart_count()))


def grace(folder: str) -> None:
    """A rank that writes how long its torchrun would wait for it."""
    Path(folder, "grace").write_text(str(torchrun_grace()))


def configured() -> int:
    """A command without work: what `config.main` prints and returns."""
    return config.main(TrainConfig, lambda cfg: print(f"rank {os.environ.get('RANK')} has {cfg.run.note}"), "children")


def launched(folder: str, grace: str) -> int:
    """A launcher whose rank saves for two seconds after a signal."""
    return agent.launch("tests.saver", [folder], 1, Path(folder), float(grace))


def parent(folder: str) -> int:
    """A launcher whose rank goes on until its parent dies."""
    return agent.launch("tests.children", ["orphan", folder], 1, Path(folder), 60)


def again(folder: str) -> None:
    """A rank that says what went wrong with each attempt, as the trainer does."""
    path, attempt = Path(folder), f"attempt {restart_count()} went wrong"
    path.joinpath(f"attempt-{restart_count()}").touch()
    agent.write_status(path, "failed", agent.FAILED, attempt, rank=0)
    write_failure(path, here(ERROR, 0, Activity(), attempt))
    sys.exit(1)


def slow(folder: str, grace: str, *overrides: str) -> int:
    """The launcher of the trainer whose saves are slow."""
    return agent.launch("tests.slow_trainer", overrides, 2, Path(folder), float(grace))


def orphan(folder: str) -> None:
    """A rank that tells its process id and stays."""
    die_with_parent()
    Path(folder, "pid").write_text(str(os.getpid()))
    time.sleep(300)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    sys.argv = [sys.argv[0], *arguments]
    sys.exit(configured() if verb == "configured" else globals()[verb](*arguments))
