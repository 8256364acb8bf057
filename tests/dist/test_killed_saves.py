"""Proof 1 (A7, X4): all ranks are killed at every boundary of a save and at random moments of it; nothing is lost."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from sftdist.training import checkpoint
from sftdist.training.checkpoint_files import checkpoints_in, verify
from tests.e2e.jobs import TRAIN, Running
from tests.e2e.workshop import status
from tests.faults import Contents, Fault, Faults, Job, contents, no_fault
from tests.held import Hold
from tests.saving import RANKS, Shape, Whole, assert_equal_runs, assert_no_litter, go_on_to_the_end, whole_run


@dataclass(frozen=True)
class Kill:
    """When the ranks die: when `rank` comes to operation `number` of the save, or `after` seconds from its begin."""

    rank: int = 0
    number: int | None = None
    after: float = 0.0


def random_kills(whole: Whole, count: int, seed: int) -> list[Kill]:
    duration = max(operations[-1].at for operations in whole.operations)
    draw = random.Random(seed)
    return [Kill(after=draw.uniform(0, 1.1 * duration)) for _ in range(count)]


def kill_in_turn(home: Path, shape: Shape, run_dir: Path, kills: Iterable[Kill], newest: int = 0) -> int:
    """Starts in one directory, each killed in its second save: so each is the resume of the one before, too."""
    for kill in kills:
        newest = killed_start(home, shape, run_dir, newest, kill)
    return newest


def end_well(home: Path, shape: Shape, run_dir: Path, newest: int, whole: Whole) -> None:
    """At last the run may go on to its end."""
    go_on_to_the_end(home, shape, run_dir, newest)
    assert_equal_runs(run_dir, whole.run_dir)
    assert_no_litter(run_dir)


def killed_start(home: Path, shape: Shape, run_dir: Path, newest: int, kill: Kill, fault: Fault = no_fault) -> int:
    """Start (with one more fault), kill, and look at what is left; the newest checkpoint."""
    step = newest + 2
    faults = Faults(fault, Hold(run_dir, step, kill.rank, kill.number))
    with Job(RANKS, shape.overrides(run_dir), home, faults) as job:
        assert job.hear(0, "resumed") == newest
        before = job.hear(0, "begin")
        if kill.number is None:
            time.sleep(kill.after)
        else:
            job.hear(kill.rank, "held")
        job.kill()
    left = checkpoints_in(run_dir / "checkpoints")
    assert left, "no checkpoint is left"
    problems = [problem for info in left for problem in verify(info.path)]
    assert not problems, problems
    assert left[-1].step in (step - 1, step) or (shape.background and left[-1].step > step)
    assert verify(run_dir / (run_dir / "LATEST").read_text().strip()) == []
    assert_nothing_else_moved(before, contents(run_dir), step, run_dir)
    return left[-1].step


def assert_nothing_else_moved(before: Contents, after: Contents, step: int, run_dir: Path) -> None:
    """A save makes its own directory and renames `LATEST`; what it prunes loses its name before its first file."""
    for name in sorted({*before, *after}):
        if before.get(name) == after.get(name) or name == "LATEST":
            continue
        folder = re.fullmatch(r"checkpoints/([^/]+)/.+", name)
        if folder is None and name in before:  # in the background training goes on: lines are added behind the old ones
            size, digest = before[name]
            grown = name.endswith((".jsonl", ".log")) and contents(run_dir, limits={name: size})[name] == (size, digest)
            assert grown or (name == "status.json" and status(run_dir)["state"] == "running"), name
        elif folder is None:
            assert re.fullmatch(r"\.(LATEST|status\.json)\.\w+\.tmp", name), name
        elif name in before:
            assert not (run_dir / "checkpoints" / folder[1]).exists(), name
        else:
            assert folder[1].startswith(".") or int(folder[1].removeprefix("step-")) >= step, name


def test_killed_ten_times_in_a_save(home: Path, shape: Shape, whole: Whole) -> None:
    """At six boundaries, and at four moments of a save in the background."""
    of_main = ("half of .*part", r"rename .*state\.json", "rename checkpoints/step$", "rename LATEST", "remove .*rng")
    kills = [Kill(0, number) for number in whole.numbers(0, *of_main)]
    kills += [Kill(1, number) for number in whole.numbers(1, "half of .*part-00001")]
    newest = kill_in_turn(home, shape, home / "cut", kills)
    background = replace(shape, background=True)
    newest = kill_in_turn(home, background, home / "cut", random_kills(whole, 4, seed=1), newest)
    end_well(home, background, home / "cut", newest, whole)


def too_early(rank: int, pipe: Connection) -> None:
    """A wrong save: `LATEST` names the directory before it has that name."""
    commit = checkpoint.commit_directory

    def early(temp: Path, final: Path, *more: Any, **named: Any) -> bool:
        (final.parents[1] / "LATEST").write_text(f"{final.parent.name}/{final.name}\n")
        return commit(temp, final, *more, **named)

    checkpoint.commit_directory = early


def by_its_name(rank: int, pipe: Connection) -> None:
    """A wrong pruning: file by file, while the directory has its name."""
    checkpoint.remove_path = shutil.rmtree


@pytest.mark.parametrize(
    ("careless", "behind", "more"), [(too_early, "rename checkpoints/step$", 0), (by_its_name, "rename LATEST", 5)]
)
def test_a_careless_save_is_seen(
    home: Path, shape: Shape, whole: Whole, careless: Fault, behind: str, more: int
) -> None:
    """What these tests look at tells such saves from ours: a kill in the right moment leaves something broken."""
    shape = replace(shape, more=("checkpoint.keep_last=1",))
    kill = Kill(0, whole.numbers(0, behind)[0] + more)
    with pytest.raises(AssertionError, match=r"manifest|missing"):
        killed_start(home, shape, home / careless.__name__, 0, kill, careless)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("stage", "background"), [(2, False), (3, True)])
def test_killed_at_every_boundary(home: Path, stage: int, background: bool) -> None:
    """Before and after everything that any rank does to the disk."""
    shape = Shape(stage, steps=100, background=background)
    whole = whole_run(home, shape, f"whole-{stage}-{background}")
    assert any(operation.name == "rename LATEST" for operation in whole.operations[0])
    threads = {operation.thread for operations in whole.operations for operation in operations}
    assert ("MainThread" in threads) is not background
    kills = [Kill(rank, number) for rank in range(RANKS) for number in range(len(whole.operations[rank]))]
    assert len(kills) > 35
    run_dir = home / f"cut-{stage}-{background}"
    end_well(home, shape, run_dir, kill_in_turn(home, shape, run_dir, kills), whole)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("stage", "background", "count"), [(2, False, 20), (0, True, 10), (3, False, 10), (3, True, 10)]
)
def test_killed_fifty_times_at_random(home: Path, stage: int, background: bool, count: int) -> None:
    shape = Shape(stage, steps=2 * count + 10, background=background)
    whole = whole_run(home, shape, f"whole-{stage}-{background}-{count}")
    kills = random_kills(whole, count, seed=stage + count)
    run_dir = home / f"cut-{stage}-{background}-{count}"
    end_well(home, shape, run_dir, kill_in_turn(home, shape, run_dir, kills), whole)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_three_times_under_torchrun(home: Path, shape: Shape, whole: Whole) -> None:
    """As a user starts it: the kills come from outside when a save is seen on the disk; at last it ends with its
    export."""
    run_dir = home / "under-torchrun"
    command = [*TRAIN, *shape.overrides(run_dir), "launch.nproc=2"]
    for step in (5, 11, 17):
        with Running(command, home) as job:
            job.until(lambda: len(job.ranks()) == RANKS)
            ranks = job.ranks().values()
            wait_for_save(run_dir / "checkpoints", step)
            job.tell(signal.SIGKILL, *ranks)
            assert job.end() == 1, job.screen
        left = checkpoints_in(run_dir / "checkpoints")
        assert all(verify(info.path) == [] for info in left)
        assert step - 1 <= left[-1].step < shape.steps
        assert status(run_dir)["state"] == "failed"
    with Running(command, home) as job:
        assert job.end() == 0, job.screen
        assert f"resuming from step {left[-1].step}," in job.screen
    assert status(run_dir)["state"] == "done"
    assert_equal_runs(run_dir, whole.run_dir)
    assert_no_litter(run_dir)


def wait_for_save(folder: Path, step: int) -> None:
    """Until something of that step or of a later one is written."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        names = [path.name for path in folder.glob(".step-*")]
        if any(int(re.findall(r"step-(\d+)", name)[0]) >= step for name in names):
            return
        time.sleep(0.001)
    raise AssertionError(f"no save of step {step} in {folder}")
