"""Two processes that sum numbers, over gloo and, with two GPUs, over NCCL; the host's name and its interfaces."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sftdist.commands.doctor_checks.finding import Finding, note, ok, problem
from sftdist.commands.doctor_checks.probe import module
from sftdist.core.storage import read_json

RANKS = 2
SECONDS = 60.0  # with the imports of four processes, which have just been read by the probes
_IMPORTS = 10.0  # or this many times what one process took: the machine or its disk may be slow
_INFINIBAND = Path("/sys/class/infiniband")
_NAMES = {"gloo": "gloo (which connects processes", "nccl": "NCCL (which connects GPUs"}


@dataclass(frozen=True)
class Network:
    """`addresses`: what the host's name resolves to; `interfaces`: name -> its addresses, without those that have none;
    `infiniband`: its devices; `chosen`: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where they are set."""

    host: str
    addresses: tuple[str, ...]
    interfaces: Mapping[str, tuple[str, ...]]
    infiniband: tuple[str, ...] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Collective:
    """`seconds`: of each backend that summed right; `stage`: how far the test came; `error`: why not further; `gpus`:
    what torch sees."""

    seconds: Mapping[str, float]
    stage: str = "done"
    error: str = ""


def look() -> Network:
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: tuple(item.address.partition("%")[0] for item in items if item.family in families)
        for name, items in psutil.net_if_addrs().items()
    }
    host = socket.gethostname()
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return Network(
        host=host,
        addresses=_addresses(host),
        interfaces={name: addresses for name, addresses in found.items() if addresses},
        infiniband=tuple(sorted(path.name for path in _INFINIBAND.glob("*"))),
        chosen={name: os.environ[name] for name in names if name in os.environ},
    )


def _addresses(host: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(item[4][0]) for item in found))


def try_collective(import_seconds: float) -> Collective:
    """Start two ranks as training does, and see them sum. `import_seconds`: what a process took to import torch."""
    seconds = max(SECONDS, _IMPORTS * import_seconds)
    with tempfile.TemporaryDirectory(prefix="sftdist-doctor-") as folder:
        with module("probe_collective", folder) as child:
            ended = child.wait(seconds)
        diaries = [read_json(path) for path in sorted(Path(folder).glob("rank-*.json"))]
        return _collective(diaries, ended, seconds)


def _collective(diaries: list[dict[str, Any]], ended: int | None, seconds: float) -> Collective:
    """What the ranks have left; `ended`: the agent's exit code, None where it was still running."""
    summed = [name for name in _NAMES if diaries and all(name in diary for diary in diaries)]
    times = {name: max(float(diary[name]) for diary in diaries) for name in summed}
    if ended == 0:
        return Collective(times)
    stage = next((diary["stage"] for diary in diaries if diary["stage"] != "done"), "starting two processes")
    said = next((diary["error"] for diary in diaries if "error" in diary), "")
    if ended is None:
        said = said or f"nothing happened for {seconds:.0f} seconds"
    return Collective(times, stage, said or f"a process died without a word (exit code {ended})")


def findings(network: Network, collective: Collective | None, gpus: int) -> Iterator[Finding]:
    """`collective`: None where it was not tried; `gpus`: how many torch sees."""
    yield _host_name(network)
    if collective is None:
        yield note("collective", "not tried: two processes that sum numbers together, as the processes of training do")
        return
    if collective.error:
        yield problem("collective", _failure(collective), _cause(network, collective))
        return
    times = " and ".join(f"{_NAMES[name]}; {time * 1000:.0f} ms)" for name, time in collective.seconds.items())
    text = f"two processes were started as training starts them, and summed 4 MiB over {times}"
    if gpus < RANKS:
        text += f". NCCL, which connects GPUs, was not tried: that takes {RANKS} GPUs"
    yield ok("collective", text)


def _failure(collective: Collective) -> str:
    error = re.sub(r"\[enforce fail at .*?\] ", "", collective.error.strip().splitlines()[0])
    done = "".join(f"{name} worked. " for name in collective.seconds)
    return (
        f"two processes of this machine cannot work together. {done}The test failed while {collective.stage}: {error}"
    )


def _cause(network: Network, collective: Collective) -> str:
    for variable, value in network.chosen.items():
        if not any(_means(variable, value, name) for name in network.interfaces):
            return f"{variable}={value} names no interface of this host; it has {', '.join(network.interfaces)}."
    if not any(address.startswith("127.") for addresses in network.interfaces.values() for address in addresses):
        return "The loopback interface has no address:\n    ip link set lo up"
    if stray := _stray(network):
        return f"{stray}. Correct that in /etc/hosts: torch finds the processes of a job by that name."
    if "nccl" in collective.stage:
        return (
            "NCCL_DEBUG=INFO makes NCCL say more. Where it hangs between GPUs of one machine, see whether "
            "NCCL_P2P_DISABLE=1 helps: then the direct way between GPUs is broken (often by IOMMU or ACS settings)."
        )
    return f"Try GLOO_SOCKET_IFNAME={_outward(network) or 'lo'}; a firewall on this host is another possible cause."


def _means(variable: str, value: str, name: str) -> bool:
    """Whether a list of interfaces includes one. gloo's has names; NCCL's has prefixes, names after =, and after ^ what
    it leaves out."""
    words = value.lstrip("^=").split(",")
    if variable.startswith("GLOO") or value.lstrip("^").startswith("="):
        included = name in words
    else:
        included = name.startswith(tuple(words))
    return included != value.startswith("^")


def _stray(network: Network) -> str:
    """What is wrong with the addresses of the host's name; "" where nothing is."""
    if not network.addresses:
        return f"The name of this host, {network.host}, resolves to no address"
    own = {address for addresses in network.interfaces.values() for address in addresses}
    for address in network.addresses:
        if address not in own and not _is_loopback(address):
            return f"The name of this host, {network.host}, resolves to {address}, which this host does not have"
    return ""


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _outward(network: Network) -> str:
    """The first interface with an address that other hosts may reach; "" where there is none."""
    for name, addresses in network.interfaces.items():
        if any(not _is_loopback(address) and not address.startswith("fe80:") for address in addresses):
            return name
    return ""


def _host_name(network: Network) -> Finding:
    shown, count = ", ".join(network.addresses), len(network.infiniband)
    devices = f" {count} InfiniBand or RoCE device{'s' if count > 1 else ''} for fast exchange between nodes."
    fabric = devices if count else ""
    if stray := _stray(network):
        advice = "Correct that in /etc/hosts: torch finds the processes of a job by that name."
        return note("host-name", f"{stray}.{fabric}", advice)
    if not all(map(_is_loopback, network.addresses)):
        return ok("host-name", f"{network.host} resolves to {shown}, an address of this host.{fabric}")
    several = (
        " For several nodes, sftdist train launch.nodes=N chooses the interface itself; a bare torchrun needs "
        f"GLOO_SOCKET_IFNAME={_outward(network)}."
    )
    advice = several if _outward(network) else ""
    return ok("host-name", f"{network.host} resolves to {shown}: right for one machine.{advice}{fabric}")
