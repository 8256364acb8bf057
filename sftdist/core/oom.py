"""How often the kernel has killed for memory: a rise of this count explains a process that ended without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")


def oom_kills(membership: Path = MEMBERSHIP, mount: Path = MOUNT, vmstat: Path = VMSTAT) -> int:
    """Kills for memory in this process's control group (version 1 or 2), else on this host, so far; 0 where the
    kernel does not count them. A process that the kernel kills because the whole host is out of memory is counted in
    its control group, too."""
    for counters in (*_group_counters(membership, mount), vmstat):
        if counters.is_file():
            return _counter(counters)
    return 0


def _group_counters(membership: Path, mount: Path) -> Iterator[Path]:
    """The counter files that this process's own group may have, the group's own folder first. In a container the path
    may be the host's: then the mount is the group."""
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.oom_control"
        elif not controllers:
            root, name = mount, "memory.events"
        else:
            continue
        yield root / path.lstrip("/") / name
        yield root / name


def _counter(path: Path) -> int:
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(int(count) for name, count in rows if name == "oom_kill")
