from __future__ import annotations

import argparse
import socket

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from sftdist.core import nodes as module
from sftdist.core.errors import ConfigError
from sftdist.core.nodes import Nodes, is_own, own_addresses, rendezvous, require_port, source_address

ELSEWHERE = "203.0.113.7"  # reserved for documentation: nobody's


def read(nodes: Nodes | None, grace: float = 60.0) -> argparse.Namespace:
    """The arguments as torchrun itself reads them."""
    return torchrun.parse_args([*rendezvous(nodes, grace), "-m", "anything"])


def test_torchrun_reads_what_is_meant() -> None:
    assert read(None).standalone
    static, _, _ = torchrun.config_from_args(read(Nodes(3, "10.0.0.1:29500", 2)))
    assert (static.min_nodes, static.max_nodes, static.rdzv_backend) == (3, 3, "static")
    assert (static.rdzv_endpoint, static.rdzv_configs["rank"]) == ("10.0.0.1:29500", 2)
    elastic, _, _ = torchrun.config_from_args(read(Nodes(3, f"{ELSEWHERE}:29500", None)))
    assert (elastic.min_nodes, elastic.max_nodes, elastic.rdzv_backend) == (3, 3, "c10d")
    assert elastic.rdzv_configs["is_host"] == "false"
    assert read(Nodes(3, "localhost:29500", None)).rdzv_conf.startswith("is_host=true,")


@pytest.mark.parametrize("rank", [0, None])
def test_a_node_may_take_its_grace_to_end_before_it_comes_again(rank: int | None) -> None:
    config, _, _ = torchrun.config_from_args(read(Nodes(2, "localhost:29500", rank), grace=900.5))
    seconds = config.rdzv_configs["timeout"] if rank == 0 else config.rdzv_configs["join_timeout"]
    assert int(seconds) > 901


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("n1:29500", "n1", 29500), ("10.0.0.1:1", "10.0.0.1", 1), ("[fe80::1]:29", "fe80::1", 29)],
)
def test_an_address_is_read_as_torchrun_reads_it(address: str, host: str, port: int) -> None:
    nodes = Nodes(2, address, None)
    assert (nodes.host, nodes.port) == (host, port) == parse_rendezvous_endpoint(address, 0)


def test_the_first_number_hosts_or_who_owns_the_address() -> None:
    assert Nodes(2, f"{ELSEWHERE}:1", 0).hosting
    assert not Nodes(2, "localhost:1", 1).hosting
    assert Nodes(2, "localhost:1", None).hosting
    assert not Nodes(2, f"{ELSEWHERE}:1", None).hosting


def test_what_is_this_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(is_own(address) for address in own_addresses())
    assert is_own("127.0.1.1"), "what Debian calls a host by, on no interface of its own"
    assert not is_own(ELSEWHERE)
    assert not is_own("no-such-host.invalid")
    monkeypatch.setattr(module, "own_addresses", lambda: {ELSEWHERE: "eth9"})
    assert is_own(ELSEWHERE)


def test_the_way_to_a_host() -> None:
    assert source_address("127.0.0.1", 29500) == "127.0.0.1"
    assert own_addresses()["127.0.0.1"] == "lo"
    assert source_address("no-such-host.invalid", 29500) is None


@pytest.mark.parametrize("listening_on", ["127.0.0.1", ""])
def test_a_port_in_use_is_named_with_who_uses_it(listening_on: str) -> None:
    with socket.create_server((listening_on, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} \(Address already in use: process \d+, .*another port"):
            require_port(Nodes(2, f"localhost:{port}", 0))
        require_port(Nodes(2, f"localhost:{port}", 1))  # not this node's port
    require_port(Nodes(2, f"localhost:{port}", 0))


def test_a_port_of_a_run_that_has_just_ended_is_free() -> None:
    """Its connections are still in the kernel's table (TIME_WAIT)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # this side closes first
            client.recv(1)
    require_port(Nodes(2, f"localhost:{port}", 0))
