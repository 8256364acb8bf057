"""Cores, memory, limits and the clock of this host."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from sftdist.commands.doctor_checks.finding import GIB, Finding, note, ok, size
from sftdist.core import memory

_UNLIMITED = -1
_FEW_FILES = 1024
_MANY_FILES = 65536
_LITTLE_MEMORY = 4 * GIB
_TIMEX = "@Illlli"  # the first fields of the kernel's struct timex, up to its status
_TIMEX_BYTES = 512  # more than it has
_UNSYNCHRONISED = 0x40


@dataclass(frozen=True)
class Host:
    """Bytes, of which `limit` is what a control group allows (None: no limit); `files` and `locked`: the limits of open
    files and of locked memory, -1 for none; `synchronised`: None where the kernel does not say."""

    cores: int
    usable_cores: int
    memory: int
    free: int
    limit: int | None
    files: int
    locked: int
    synchronised: bool | None


def look() -> Host:
    return Host(
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        free=memory.free_bytes(),
        limit=min((group.limit for group in memory.limits()), default=None),
        files=_soft(resource.RLIMIT_NOFILE),
        locked=_soft(resource.RLIMIT_MEMLOCK),
        synchronised=_synchronised(),
    )


def _soft(limit: int) -> int:
    value = resource.getrlimit(limit)[0]
    return _UNLIMITED if value == resource.RLIM_INFINITY else value


def _synchronised() -> bool | None:
    """Asked of the kernel, which changes nothing: the first field is 0."""
    if sys.platform != "linux":
        return None
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    if ctypes.CDLL(None).adjtimex(buffer) < 0:
        return None
    return not struct.unpack_from(_TIMEX, buffer.raw)[-1] & _UNSYNCHRONISED


def findings(host: Host, infiniband: bool) -> Iterator[Finding]:
    yield _memory(host)
    yield _limits(host, infiniband)
    yield _clock(host)


def _memory(host: Host) -> Finding:
    cores = f"{host.usable_cores} cores"
    if host.usable_cores < host.cores:
        cores += f" of {host.cores} (the others are not for this process)"
    text = f"{cores}; {size(host.free)} of memory free of {size(host.memory)}"
    if host.limit is not None and host.limit < host.memory:
        text += f", of which this container or job may use {size(host.limit)}"
    if host.free < _LITTLE_MEMORY:
        return note("host", text, "That is little: a process that trains takes 1 to 2 GiB before any model is loaded.")
    return ok("host", text)


def _limits(host: Host, infiniband: bool) -> Finding:
    files = "any number of" if host.files == _UNLIMITED else f"at most {host.files}"
    locked = "any amount" if host.locked == _UNLIMITED else f"at most {size(host.locked)}"
    text = f"each process may have {files} open files, and {locked} of locked memory"
    if 0 <= host.files < _FEW_FILES:
        return note("limits", text, f"Few open files for many ranks: ulimit -n {_MANY_FILES}")
    if infiniband and host.locked != _UNLIMITED:
        return note("limits", text, "InfiniBand needs locked memory for its transfers: ulimit -l unlimited")
    return ok("limits", text)


def _clock(host: Host) -> Finding:
    if host.synchronised is None:
        return ok("clock", "the system does not say whether it is kept right; training does not depend on it")
    if host.synchronised:
        return ok("clock", "kept right by a time service")
    text = (
        "no time service (NTP) is known to keep it right. Training does not depend on it; the times in logs of several "
        "hosts may not match"
    )
    return ok("clock", text)
