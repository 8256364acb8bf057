"""The memory of a process: the machine's, or what its control groups leave, by files of both versions and for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sftdist.core.memory import Limit, free_bytes, limits, total_bytes

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


@pytest.mark.parametrize(
    ("names", "line", "mount"), [(V2, "0::/job/rank", "."), (V1, "8:cpu,memory:/job/rank", "memory")], ids=["v2", "v1"]
)
def test_every_group_above_counts_and_page_cache_does_not(
    tmp_path: Path, names: tuple[str, str, str], line: str, mount: str
) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text(f"3:cpuset:/elsewhere\n{line}\n")
    group(tmp_path / mount / "job" / "rank", names, "max" if names is V2 else "9223372036854771712", 1000, 0)
    group(tmp_path / mount / "job", names, "5000", 3000, 1200)
    found = [limit for limit in limits(membership, tmp_path) if limit.limit < 2**40]
    assert found == [Limit(limit=5000, used=1800)]


def test_a_path_of_the_host_inside_a_container_falls_back_to_the_mount(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/docker/of-the-host\n")
    group(tmp_path / "mount", V2, "700", 500, 100)
    assert limits(tmp_path / "cgroup", tmp_path / "mount") == [Limit(limit=700, used=400)]


def test_without_groups_it_is_the_machine(tmp_path: Path) -> None:
    assert limits(tmp_path / "absent", tmp_path) == []
    assert 0 < free_bytes() <= total_bytes() <= psutil.virtual_memory().total


def test_a_real_limit_is_seen_from_inside() -> None:
    root = Path("/sys/fs/cgroup/memory")
    names = V1 if root.is_dir() else V2
    folder = (root if root.is_dir() else Path("/sys/fs/cgroup")) / f"sftdist-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / names[0]).write_text(str(2**29))
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error})")
    script = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from sftdist.core import memory; print(memory.total_bytes(), memory.free_bytes())"
    )
    command = [sys.executable, "-c", script, str(folder / "cgroup.procs")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True)
    finally:
        folder.rmdir()
    total, free = map(int, done.stdout.split())
    assert total == 2**29
    assert 2**28 < free < 2**29
