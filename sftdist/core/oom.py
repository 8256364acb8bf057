"""How often the kernel has killed for memory: a rise of this count explains a process that ended without a word."""

from __future__ import annotations

from pathlib import Path

from sftdist.core.memory import MEMBERSHIP, MOUNT, control_groups

VMSTAT = Path("/proc/vmstat")


def oom_kills(membership: Path = MEMBERSHIP, mount: Path = MOUNT, vmstat: Path = VMSTAT) -> int:
    """Kills for memory in this process's control group (version 1 or 2), else on this host, so far; 0 where the
    kernel does not count them. A process that the kernel kills because the whole host is out of memory is counted in
    its control group, too."""
    groups = [
        folder / ("memory.events" if unified else "memory.oom_control")
        for unified, folders in control_groups(membership, mount)
        for folder in folders
    ]
    return next((_counter(path) for path in (*groups, vmstat) if path.is_file()), 0)


def _counter(path: Path) -> int:
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(int(count) for name, count in rows if name == "oom_kill")
