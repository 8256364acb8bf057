"""Agents that are processes of their own: each opens the meeting, waits for the others, and then for its ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from sftdist.core import relay
from sftdist.core.errors import StartupError
from sftdist.core.meeting import meet, open_store
from sftdist.core.nodes import Nodes
from sftdist.core.relay import LINGER_SECONDS, Relay
from tests.ranks import context

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


def agent(pipe: Connection, nodes: Nodes) -> None:
    """Says what happens to it."""
    store = open_store(nodes)
    try:
        with Relay(store, nodes.count, serving=nodes.hosting) as others:
            try:
                pipe.send("here")
                meet(store, nodes, {}, "start")
                pipe.send("met")
                time.sleep(60)
            except SignalException as error:
                pipe.send(signal.Signals(error.sigval).name)
                while not others.stopped:
                    time.sleep(0.01)
    except StartupError as error:
        pipe.send(str(error))


class Agents:
    """As many processes as nodes, the first of which hosts the meeting; `missing`: how many do not come."""

    def __init__(self, count: int, missing: int = 0, program: Callable[[Connection, Nodes], None] = agent) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            nodes = Nodes(count, f"127.0.0.1:{server.getsockname()[1]}", 0, seconds=60.0)
        self.processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        for rank in range(count - missing):
            mine, theirs = context.Pipe()
            process = context.Process(target=program, args=(theirs, replace(nodes, rank=rank)), daemon=True)
            process.start()
            self._pipes.append(mine)
            self.processes.append(process)

    def hear(self, rank: int, seconds: float = 60.0) -> str:
        """What an agent says next."""
        assert self._pipes[rank].poll(seconds), f"agent {rank} says nothing"
        word: str = self._pipes[rank].recv()
        return word

    def say(self, rank: int, word: str) -> None:
        self._pipes[rank].send(word)

    def tell(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


@pytest.fixture
def three() -> Iterator[Agents]:
    agents = Agents(3)
    for rank in range(3):
        assert (agents.hear(rank), agents.hear(rank)) == ("here", "met")
    yield agents
    for process in agents.processes:
        process.kill()


@pytest.mark.parametrize(("rank", "number"), [(0, USR1), (2, INT)])
def test_a_signal_to_one_stops_all(three: Agents, rank: int, number: signal.Signals) -> None:
    """Also where the one that serves the store leaves at once."""
    began = time.monotonic()
    three.tell(rank, number)
    assert three.hear(rank) == f"{number.name}"
    for other in {0, 1, 2} - {rank}:
        assert three.hear(other) == "SIGTERM"
    for process in three.processes:
        process.join(30)
        assert process.exitcode == 0
    assert time.monotonic() - began < LINGER_SECONDS, "nobody waits longer than the others need to hear of it"


def test_a_signal_to_all_is_not_passed_on(three: Agents) -> None:
    """A third signal would make torchrun leave its ranks."""
    for rank in range(3):
        three.tell(rank, USR1)
    for rank in range(3):
        assert three.hear(rank) == "SIGUSR1"
    for process in three.processes:
        process.join(30)
        assert process.exitcode == 0


def test_a_signal_while_another_is_awaited(three: Agents) -> None:
    waiting = Agents(3, missing=1)
    assert (waiting.hear(0), waiting.hear(1)) == ("here", "here")
    waiting.tell(1, TERM)
    assert (waiting.hear(0), waiting.hear(1)) == ("SIGTERM", "SIGTERM")


def test_a_host_that_dies_while_others_wait_is_named() -> None:
    waiting = Agents(3, missing=1)
    assert (waiting.hear(0), waiting.hear(1)) == ("here", "here")
    waiting.tell(0, signal.SIGKILL)
    assert "the node that hosts the meeting has left before all nodes had come" in waiting.hear(1)


def failing(pipe: Connection, nodes: Nodes) -> None:
    """One has a child that would stay; the other one says that it gives up, where it is not killed before."""
    relay.ALONE_SECONDS = 1.0
    with Relay(open_store(nodes), nodes.count, serving=nodes.hosting) as others:
        pipe.send("here")
        if pipe.recv() == "fail":
            others.fail()
            time.sleep(60)
        child = subprocess.Popen(["sleep", "60"])
        began = time.monotonic()
        pipe.send(f"{-child.wait()} {others.alone} {time.monotonic() - began > 0.5}")


@pytest.mark.parametrize(("gone", "killed"), [(0, True), (0, False), (1, False)])
def test_ranks_that_wait_for_those_of_a_node_that_has_failed_are_ended(gone: int, killed: bool) -> None:
    """One that is killed is only missed where it serves the store."""
    pair = Agents(2, program=failing)
    assert (pair.hear(0), pair.hear(1)) == ("here", "here")
    pair.say(1 - gone, "stay")
    if killed:
        pair.tell(gone, signal.SIGKILL)
    else:
        pair.say(gone, "fail")
    assert pair.hear(1 - gone) == f"{int(signal.SIGKILL)} True True"
    pair.processes[gone].kill()
