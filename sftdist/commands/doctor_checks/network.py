"""Two processes that sum numbers, over gloo and, with two GPUs, over NCCL; the host's name and its interfaces."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sftdist.commands.doctor_checks.finding import Finding, note, ok, problem
from sftdist.commands.doctor_checks.probe import running
from sftdist.core.storage import read_json

RANKS = 2
SECONDS = 120.0  # with the imports of three processes
_RANK = "sftdist.commands.doctor_checks.probe_ranks"
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


def try_collective(seconds: float = SECONDS) -> Collective:
    """Start two ranks as training does, and see them sum."""
    with tempfile.TemporaryDirectory(prefix="sftdist-doctor-") as folder:
        command = [sys.executable, "-m", "sftdist.core.agent", folder, "--standalone", "--nproc-per-node", str(RANKS)]
        with running([*command, "-m", _RANK, folder], {"OMP_NUM_THREADS": "1"}) as child:
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
        yield note("collective", "not tried (--skip-collective): two processes that sum numbers")
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
        wanted = re.split(r",", value.lstrip("^="))
        if not value.startswith("^") and not any(_names(wanted, value, name) for name in network.interfaces):
            return f"{variable}={value} names no interface of this host; it has {', '.join(network.interfaces)}."
    if not any(address.startswith("127.") for addresses in network.interfaces.values() for address in addresses):
        return "The loopback interface has no address:\n    ip link set lo up"
    foreign = _foreign(network)
    if foreign:
        return (
            f"The name of this host, {network.host}, resolves to {foreign}, which is no address of it. Correct "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME and the address in it."
        )
    if "nccl" in collective.stage:
        return (
            "NCCL_DEBUG=INFO makes NCCL say more. Where it hangs between GPUs of one machine, see whether "
            "NCCL_P2P_DISABLE=1 helps: then the direct way between GPUs is broken (often by IOMMU or ACS settings)."
        )
    return f"Try GLOO_SOCKET_IFNAME={_outward(network) or 'lo'}; a firewall on this host is another possible cause."


def _names(wanted: list[str], value: str, name: str) -> bool:
    """gloo takes a list of names; NCCL a list of prefixes, or of names after =."""
    return any(name == word or (not value.startswith("=") and name.startswith(word)) for word in wanted)


def _foreign(network: Network) -> str:
    """An address that the host's name has and that the host has not; "no address" where it resolves to none."""
    if not network.addresses:
        return "no address"
    own = {address for addresses in network.interfaces.values() for address in addresses}
    return next((a for a in network.addresses if a not in own and not _is_loopback(a)), "")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _outward(network: Network) -> str:
    """The first interface with an address that other hosts may reach; "" where there is none."""
    for name, addresses in network.interfaces.items():
        if any(not _is_loopback(address) and not address.startswith("fe80:") for address in addresses):
            return name
    return ""


def _host_name(network: Network) -> Finding:
    shown = ", ".join(network.addresses)
    count = len(network.infiniband)
    fabric = (
        f" {count} InfiniBand or RoCE device{'s' if count > 1 else ''} for fast exchange between nodes."
        if count
        else ""
    )
    if foreign := _foreign(network):
        text = (
            f"{network.host} resolves to {foreign if not network.addresses else shown}, which this host does not have."
        )
        if not network.addresses:
            text = f"{network.host} resolves to no address."
        advice = "Add it to /etc/hosts with an address of this host: torch finds the processes of a job by that name."
        return note("host-name", text + fabric, advice)
    if all(map(_is_loopback, network.addresses)):
        text = f"{network.host} resolves to {shown}: right for one machine."
        interface = _outward(network)
        several = (
            f"For several nodes, sftdist train launch.nodes=N chooses the interface itself; a bare torchrun needs "
            f"GLOO_SOCKET_IFNAME={interface}."
        )
        return ok("host-name", text + (f" {several}" if interface else "") + fabric)
    return ok("host-name", f"{network.host} resolves to {shown}, an address of this host.{fabric}")
