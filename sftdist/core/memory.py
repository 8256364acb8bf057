"""Host memory that this process may use: the machine's, or what its control groups leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
# limit, use, and the name in memory.stat of the page cache that the kernel gives back before it kills
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@dataclass(frozen=True)
class Limit:
    """One control group with a memory limit, in bytes; `used` leaves out page cache that can be given back."""

    limit: int
    used: int


def total_bytes() -> int:
    """Memory of this machine, or the smallest limit of a control group that this process is in."""
    return min([psutil.virtual_memory().total, *(group.limit for group in limits())])


def free_bytes() -> int:
    """Memory that this process can still take without a swap or a kill."""
    return min([psutil.virtual_memory().available, *(max(0, group.limit - group.used) for group in limits())])


def limits(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> list[Limit]:
    """The limits of this process's control group and of those above it, version 1 and 2; none without /proc."""
    return [
        limit
        for unified, folders in control_groups(membership, mount)
        for folder in folders
        for limit in _limit(folder, _V2 if unified else _V1)
    ]


def control_groups(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> Iterator[tuple[bool, list[Path]]]:
    """For the memory controller: whether it is version 2, and the folders of this process's group and of all above."""
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield True, list(_upwards(mount, path))
        elif "memory" in controllers.split(","):
            yield False, list(_upwards(mount / "memory", path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and all above it. In a container the path may be the host's: then the mount is the group."""
    folder = mount / path.lstrip("/")
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _limit(folder: Path, files: tuple[str, str, str]) -> Iterator[Limit]:
    limit, used, cache = files
    if not (folder / limit).is_file() or not (folder / used).is_file():
        return
    text = (folder / limit).read_text(encoding="utf-8").strip()
    if text == "max":
        return
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    taken = int((folder / used).read_text(encoding="utf-8")) - int(stat.get(cache, 0))
    yield Limit(int(text), max(0, taken))
