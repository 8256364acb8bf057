from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from sftdist.core.distributed import World
from sftdist.core.memory import control_groups
from sftdist.core.oom import oom_kills
from tests.watched import Case, play

LIMIT = 128 * 2**20


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("4:memory:/job/7\n0::/\n", {"memory/job/7/memory.oom_control": "under_oom 0\noom_kill 3\n"}, 3),
        ("4:cpu,memory:/job/7\n", {"memory/memory.oom_control": "oom_kill_disable 0\noom_kill 2\n"}, 2),
        ("0::/job/7\n", {"job/7/memory.events": "oom 9\noom_kill 4\noom_group_kill 1\n"}, 4),
        ("0::/host/path\n", {"memory.events": "oom_kill 5\n"}, 5),
        ("4:cpu:/\n0::/\n", {"vmstat": "nr_free_pages 1\noom_kill 6\n"}, 6),
        ("4:cpu:/\n0::/\n", {}, 0),
        (None, {"vmstat": "oom_kill 7\n"}, 7),
    ],
)
def test_the_count_of_the_own_group(
    tmp_path: Path, membership: str | None, files: dict[str, str], expected: int
) -> None:
    if membership is not None:
        (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path / "cgroup", tmp_path, tmp_path / "vmstat") == expected


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of our own with little memory, below that of this process."""
    reason = "no memory controller"
    for unified, folders in control_groups():
        group = folders[0] / f"sftdist-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError as error:
            reason = str(error)
            continue
        limit = group / ("memory.max" if unified else "memory.limit_in_bytes")
        if limit.exists():
            limit.write_text(str(LIMIT))
            yield group
            group.rmdir()
            return
        group.rmdir()
    pytest.skip(f"no memory control group can be made here: {reason}")


def enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def eat_memory(world: World) -> None:
    world.progress.begin_step(7, ["row-1"])
    time.sleep(1)
    eaten = []
    while world.rank == 1:
        eaten.append(b"x" * 2**20)
    world.barrier()


def test_a_kill_for_memory_is_named(tmp_path: Path, small_group: Path) -> None:
    outcome = play(Case(eat_memory, size=2, before=partial(enter, small_group)), tmp_path)
    assert (outcome.report.rank, outcome.report.kind, outcome.report.step) == (1, "killed", 7)
    assert "memory ran out" in outcome.report.message
    assert "train.pack_tokens" in outcome.report.message
    assert outcome.codes == [1, -9]
    assert outcome.seconds < 15
