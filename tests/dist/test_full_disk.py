"""Proof 2 (A7): the disk fills up in the middle of a save, or of a line: the run stops with the reason, the earlier
checkpoint is whole, and once there is room the same command goes on, bit-equal."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sftdist.core.failure import read_failure
from sftdist.training.checkpoint_files import checkpoints_in, steps_in, verify
from tests.e2e.workshop import status
from tests.faults import Job, after_save, before_save, contents
from tests.saving import RANKS, Shape, Whole, assert_equal_runs, assert_no_litter, go_on_to_the_end

BALLAST = "ballast"
MEGABYTES = 24
PAGE = 4096


@dataclass(frozen=True)
class FillDisk:
    """A fault: before the save of step `step`, or after it, a ballast file takes all of the disk but `pages`."""

    disk: Path
    step: int
    pages: int
    after: bool = False

    def __call__(self, rank: int, pipe: Connection) -> None:
        if rank == 0:
            (after_save if self.after else before_save)(self._fill)

    def _fill(self, step: int) -> None:
        if step == self.step:
            fill(self.disk, self.pages)


def fill(disk: Path, pages: int) -> None:
    found = os.statvfs(disk)
    with (disk / BALLAST).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (found.f_bavail - pages) * found.f_frsize)


@pytest.fixture
def disk(home: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    path = home / "disk"
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def stopped_by_the_disk(home: Path, disk: Path, shape: Shape, fault: FillDisk) -> str:
    """Start the run; it ends with code 1, says why and what to do, and what it has saved before is whole."""
    with Job(RANKS, shape.overrides(disk / "run"), home, fault) as job:
        codes = job.codes()
        screen = job.screen()
    assert codes == [1] * RANKS, screen
    assert "No space left" in screen
    assert "ake room" in screen
    assert "then run the same command again" in screen
    assert "Traceback" not in screen
    assert all(verify(info.path) == [] for info in checkpoints_in(disk / "run/checkpoints"))
    return screen


def newest(run_dir: Path) -> int:
    return max(steps_in(run_dir / "checkpoints"), default=0)


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_save_that_finds_the_disk_full(home: Path, disk: Path, shape: Shape, whole: Whole, background: bool) -> None:
    """No room for the first file; for the second; for the small ones; for `LATEST`, when the checkpoint is there."""
    shape = replace(shape, checks=True, background=background)
    sizes = [size for size, _ in contents(checkpoints_in(whole.run_dir / "checkpoints")[-1].path).values()]
    pages = sum(-(-size // PAGE) for size in sizes)
    run_dir = disk / "run"
    for room in (0, pages // 3, pages - 1, pages):
        before = newest(run_dir)
        screen = stopped_by_the_disk(home, disk, shape, FillDisk(disk, before + 2, room))
        assert newest(run_dir) == before + (2 if room == pages else 1), screen
        said = [line for line in screen.splitlines() if "No space left" in line]
        assert all(str(run_dir) in line for line in said), "the file is named"
        if 0 < room < pages:  # what was begun is removed, so that there is room to write this down
            failure = read_failure(run_dir)
            assert failure is not None
            assert "No space left" in failure.message
            assert "No space left" in status(run_dir)["reason"]
            assert_no_litter(run_dir)
        (disk / BALLAST).unlink()
    go_on_to_the_end(home, shape, run_dir, newest(run_dir))
    assert_equal_runs(run_dir, whole.run_dir)
    assert_no_litter(run_dir)


def test_a_line_that_finds_the_disk_full(home: Path, disk: Path, shape: Shape, whole: Whole) -> None:
    """A checkpoint fits, but not the figures of all steps after it: the last line is cut in its middle. As long as
    there is no room, every start says so; afterwards the file holds each step once."""
    shape = replace(shape, more=("checkpoint.every_steps=12",))
    run_dir = disk / "run"
    screen = stopped_by_the_disk(home, disk, shape, FillDisk(disk, 12, 1, after=True))
    assert ".jsonl: No space left" in screen
    assert any(not (run_dir / name).read_bytes().endswith(b"\n") for name in ("metrics.jsonl", "log/rows.jsonl"))
    assert newest(run_dir) == 12
    stopped_by_the_disk(home, disk, shape, FillDisk(disk, 0, 0))
    (disk / BALLAST).unlink()
    go_on_to_the_end(home, shape, run_dir, 12)
    assert_equal_runs(run_dir, whole.run_dir)


@dataclass(frozen=True)
class LimitFiles:
    """A fault: from the save of step `step` on, no file of rank 1 may grow beyond 64 KiB."""

    step: int

    def __call__(self, rank: int, pipe: Connection) -> None:
        if rank == 1:
            before_save(lambda step: self._limit() if step == self.step else None)

    def _limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))


@pytest.mark.long
def test_one_rank_whose_files_cannot_grow(home: Path, shape: Shape, whole: Whole) -> None:
    """Where no file system can be mounted, this still runs; and the other rank's disk is sound."""
    run_dir = home / "limited"
    with Job(RANKS, shape.overrides(run_dir), home, LimitFiles(2)) as job:
        assert job.codes() == [1] * RANKS
        screen = job.screen()
    assert re.search(r"rank 1: .*part-00001-00\.safetensors: .*File too large", screen)
    assert "Traceback" not in screen
    assert newest(run_dir) == 1
    go_on_to_the_end(home, shape, run_dir, 1)
    assert_equal_runs(run_dir, whole.run_dir)
    assert_no_litter(run_dir)
