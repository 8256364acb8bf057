"""Nodes that meet: each is a thread with a connection of its own to one store."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
from torch.distributed import Store

from sftdist.core import meeting
from sftdist.core.errors import ConfigError, StartupError
from sftdist.core.meeting import Met, meet, open_store
from sftdist.core.nodes import Nodes

PLAN = {"run.dir": "/runs/one", "command": "sftdist.train +exp=one"}


@pytest.fixture
def nodes() -> Nodes:
    """Two, at a free port of this host."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Nodes(2, f"127.0.0.1:{server.getsockname()[1]}", 0, seconds=30.0)


class Table:
    """The nodes of one meeting; the first that comes hosts it."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._host: Store = open_store(nodes)
        self._pool = ThreadPoolExecutor(8)

    def come(self, rank: int | None, start: str, plan: Mapping[str, str] = PLAN, **changes: float) -> Future[Met]:
        nodes = replace(self._nodes, rank=rank, **changes)  # type: ignore[arg-type]
        store = self._host if rank == 0 else open_store(replace(nodes, rank=1))
        return self._pool.submit(meet, store, nodes, plan, start)


def test_all_get_the_same_name_for_the_start(nodes: Nodes) -> None:
    table = Table(nodes)
    first = table.come(0, "mine")
    time.sleep(0.3)
    assert not first.done(), "it waits for the other one"
    second = table.come(1, "yours")
    met = first.result(10)
    assert met == second.result(10) == Met(met.start, "127.0.0.1", "lo")
    assert met.start in ("mine", "yours")


@pytest.mark.parametrize("rank", [0, None])
def test_who_has_come_and_who_has_not(
    nodes: Nodes, rank: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "FIRST_WORD_SECONDS", 0.2)
    table = Table(nodes)
    waiting = table.come(rank, "mine", count=3, seconds=1.5)
    other = table.come(None if rank is None else 2, "yours", count=3, seconds=1.5)
    said = rf"2 of 3 nodes have come to {nodes.address} \({socket.gethostname()}, {socket.gethostname()}\)"
    missing = "" if rank is None else "; missing: launch.node_rank=1"
    for node in (waiting, other):
        with pytest.raises(StartupError, match=rf"{said}{missing} within 2 s. Check .*every node"):
            node.result(10)
    assert "waiting: " in capsys.readouterr().out


def test_another_plan_is_refused_and_the_others_go_on_waiting(nodes: Nodes) -> None:
    table = Table(nodes)
    first = table.come(0, "mine")
    time.sleep(0.3)
    with pytest.raises(ConfigError, match=r"the same.*\n  run.dir: this node has /runs/two, .*has /runs/one$"):
        table.come(1, "yours", {**PLAN, "run.dir": "/runs/two"}).result(10)
    assert not first.done()
    table.come(1, "yours").result(10)
    first.result(10)


def test_a_number_that_is_taken(nodes: Nodes) -> None:
    table = Table(nodes)
    first = table.come(0, "mine", count=3, seconds=2.0)
    second = table.come(1, "yours", count=3, seconds=2.0)
    time.sleep(0.3)
    with pytest.raises(ConfigError, match=r"launch.node_rank=1: taken .*\(node 0: .*1: .*together"):
        table.come(1, "theirs", count=3, seconds=2.0).result(10)
    for node in (first, second):
        with pytest.raises(StartupError):
            node.result(10)


def test_one_node_too_many(nodes: Nodes) -> None:
    table = Table(nodes)
    both = [table.come(None, "a"), table.come(None, "b")]
    for node in both:
        node.result(10)
    with pytest.raises(ConfigError, match=r"launch.nodes=2: taken"):
        table.come(None, "c").result(10)


def test_nobody_hosts(nodes: Nodes) -> None:
    with pytest.raises(StartupError, match=r"within 1 s \(Connection refused\).*launch.node_rank=0.*firewall"):
        open_store(replace(nodes, rank=1, seconds=1.0))
    nobodys = Nodes(2, "no-such-host.invalid:29500", None, seconds=1.0)
    with pytest.raises(StartupError, match=r"the node that has this address; this host has the addresses .*127.0.0.1"):
        open_store(nobodys)


def test_the_first_node_may_come_later(nodes: Nodes) -> None:
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(open_store, replace(nodes, rank=1))
        time.sleep(1.0)
        host = open_store(nodes)
        host.set("key", "value")
        assert early.result(10).get("key") == b"value"


def test_what_listens_there_is_no_store(nodes: Nodes) -> None:
    with socket.create_server((nodes.host, nodes.port)):
        with pytest.raises(StartupError, match="what listens there is no sftdist run"):
            open_store(replace(nodes, rank=1, seconds=2.0))
        with pytest.raises(ConfigError, match="EADDRINUSE"):
            open_store(nodes)
