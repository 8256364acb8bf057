"""Several nodes in one run: where they meet, which of them hosts the meeting, and how this one is reached."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from dataclasses import dataclass

import psutil

from sftdist.core.errors import ConfigError

REJOIN_SECONDS = 300  # between agents that have met before
# torchrun compares the clocks of two nodes: with its default, those that differ by 15 s never meet.
_KEEP_ALIVE = "keep_alive_interval=5,keep_alive_max_attempt=60"


@dataclass(frozen=True)
class Nodes:
    """`count` nodes that meet at `address`, HOST:PORT of one of them, within `seconds`; `rank`: this one's number from
    0 on, where the first node hosts the meeting, or None, where the node that owns HOST does."""

    count: int
    address: str
    rank: int | None
    seconds: float = 1800.0

    @property
    def host(self) -> str:
        """HOST, an IPv6 address without its brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """PORT."""
        return int(self.address.rpartition(":")[2])

    @property
    def hosting(self) -> bool:
        """Whether the others come to this node."""
        return is_own(self.host) if self.rank is None else self.rank == 0


def rendezvous(nodes: Nodes | None, grace_seconds: float) -> list[str]:
    """torchrun's arguments. Between two starts of the ranks those of one node may take `grace_seconds` longer to end
    than those of another."""
    if nodes is None:
        return ["--standalone"]
    seconds = REJOIN_SECONDS + math.ceil(grace_seconds)
    common = ["--nnodes", str(nodes.count), "--rdzv-endpoint", nodes.address, "--rdzv-id", "sftdist"]
    if nodes.rank is not None:
        backend = ["--rdzv-backend", "static", "--node-rank", str(nodes.rank), "--rdzv-conf", f"timeout={seconds}"]
    else:
        host = str(nodes.hosting).lower()
        backend = ["--rdzv-backend", "c10d", "--rdzv-conf", f"is_host={host},join_timeout={seconds},{_KEEP_ALIVE}"]
    return [*common, *backend]


def require_port(nodes: Nodes) -> None:
    """Raises ConfigError where this node is to host the meeting and another program listens on the port."""
    if not nodes.hosting:
        return
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", nodes.port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)}{_listener(nodes.port)}"
        raise ConfigError(
            f"launch.address={nodes.address}: this host cannot listen on port {nodes.port} ({why}); "
            "end what uses it, or give another port on every node"
        ) from error


def is_own(host: str) -> bool:
    """Whether a name or an address is this host's."""
    own = own_addresses()
    return any(ipaddress.ip_address(address).is_loopback or address in own for address in addresses_of(host))


def addresses_of(host: str) -> list[str]:
    """The addresses of a name, [] where nobody knows it; an address is its own."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]).partition("%")[0] for entry in found]


def own_addresses() -> dict[str, str]:
    """The interface of every address of this host."""
    return {
        entry.address.partition("%")[0]: interface
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def source_address(host: str, port: int) -> str | None:
    """The address by which this host reaches another, None where it has no way there. Nothing is sent."""
    for address in addresses_of(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, port))
            except OSError:
                continue
            return str(probe.getsockname()[0]).partition("%")[0]
    return None


def _listener(port: int) -> str:
    """Who listens on a port of this host, where that can be seen."""
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid is not None:
            return f": process {found.pid}, {psutil.Process(found.pid).name()}"
    return ""
