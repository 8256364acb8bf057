"""Where the agents of several nodes meet before any rank exists: who has come, whether they mean the same run, how they
reach one another, and one name for their start. torchrun's own rendezvous says nothing while it waits, and nothing of
who is missing."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from sftdist.core.errors import ConfigError, StartupError
from sftdist.core.nodes import Nodes, own_addresses, source_address

POLL_SECONDS = 0.5
CONNECT_SECONDS = 60.0
FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 10.0, 60.0  # when a node says what it is waiting for


@dataclass(frozen=True)
class Guest:
    """A node at the meeting: its name, the address by which it has come, and a word that no other has."""

    host: str
    address: str | None
    word: str


@dataclass(frozen=True)
class Met:
    """What a node knows after the meeting: the name of the start, and the address and the interface by which it reaches
    the others (None where it has neither)."""

    start: str
    source: str | None
    interface: str | None


def open_store(nodes: Nodes) -> dist.Store:
    """The store of the meeting: this process serves it where it hosts (torchrun's store is the same one then), else it
    waits for the host. Raises ConfigError where the port is in use, StartupError where no store answers in time."""
    hosting = nodes.hosting
    if not hosting:
        _await_host(nodes)
    opened: list[dist.Store | dist.DistError] = []
    # What listens there may be no store, and never answer: torch would wait for ever.
    opener = threading.Thread(target=lambda: opened.append(_store(nodes, hosting=hosting)), name="meeting", daemon=True)
    opener.start()
    opener.join(min(CONNECT_SECONDS, nodes.seconds))
    if not opened:
        raise StartupError(_nobody(nodes, "what listens there is no sftdist run"))
    if isinstance(opened[0], dist.DistError):
        kind = ConfigError if "EADDRINUSE" in str(opened[0]) else StartupError
        raise kind(_nobody(nodes, str(opened[0])))
    return opened[0]


def meet(store: dist.Store, nodes: Nodes, plan: Mapping[str, str], start: str) -> Met:
    """Wait until all nodes have come. `plan`: what they must agree on; `start`: this node's name for the start.

    Raises ConfigError where this node's plan or number is not what the others expect, StartupError where not all come
    in time or the host leaves.
    """
    try:
        _agree(store, nodes, plan)
        seat = _sit_down(store, nodes)
        _await_all(store, nodes)
        name = store.compare_set("start", "", start).decode("utf-8")
        source = _source(store, nodes, seat)
    except dist.DistError as error:
        raise StartupError(
            f"{nodes.address}: the node that hosts the meeting has left before all nodes had come: its log says why "
            f"({error})"
        ) from error
    return Met(name, source, own_addresses().get(source or ""))


class _Waiting:
    """A time limit, and a word from time to time on what is waited for."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._word_at = time.monotonic() + FIRST_WORD_SECONDS

    def pause(self, word: Callable[[], str]) -> bool:
        """Wait for a moment; False when the time is over."""
        now = time.monotonic()
        if now >= self._word_at:
            print(f"{word()}, for {self._deadline - now:.0f} s more at most", flush=True)
            self._word_at = now + NEXT_WORD_SECONDS
        time.sleep(POLL_SECONDS)
        return now < self._deadline


def _await_host(nodes: Nodes) -> None:
    waiting = _Waiting(nodes.seconds)
    while (problem := _closed(nodes)) is not None:
        if not waiting.pause(partial(str, f"waiting for the node that hosts {nodes.address} ({problem})")):
            raise StartupError(_nobody(nodes, problem))


def _closed(nodes: Nodes) -> str | None:
    """Why nobody can be reached at the address; None where somebody listens."""
    try:
        socket.create_connection((nodes.host, nodes.port), timeout=5.0).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _store(nodes: Nodes, *, hosting: bool) -> dist.Store | dist.DistError:
    try:
        return dist.TCPStore(
            nodes.host,
            nodes.port,
            is_master=hosting,
            timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        return error


def _nobody(nodes: Nodes, problem: str) -> str:
    whose = "" if nodes.rank is not None else f"; this host has the addresses {', '.join(sorted(own_addresses()))}"
    return (
        f"launch.address={nodes.address}: no meeting of nodes there within {nodes.seconds:.0f} s ({problem}). It is "
        f"hosted by {'the node with launch.node_rank=0' if whose == '' else 'the node that has this address'}{whose}. "
        "Check that the same command runs there, that this node can reach it, and that no firewall closes the port"
    )


def _agree(store: dist.Store, nodes: Nodes, plan: Mapping[str, str]) -> None:
    """The plan of the first who comes is the one for all."""
    mine = json.dumps(dict(plan))
    first = json.loads(store.compare_set("plan", "", mine))
    differences = [key for key in {**first, **plan} if first.get(key) != plan.get(key)]
    if differences:
        raise ConfigError(
            [f"the nodes that meet at {nodes.address} do not run the same; start the same command on every node:"]
            + [
                f"  {key}: this node has {plan.get(key)}, the first that came has {first.get(key)}"
                for key in differences
            ]
        )


def _sit_down(store: dist.Store, nodes: Nodes) -> int:
    """Take the seat of this node's number, or any; a seat is taken once."""
    guest = Guest(socket.gethostname(), source_address(nodes.host, nodes.port), uuid.uuid4().hex)
    mine = json.dumps(asdict(guest))
    for seat in range(nodes.count) if nodes.rank is None else [nodes.rank]:
        taken = store.compare_set(_seat(seat), "", mine).decode("utf-8")
        if taken == mine:
            store.add("seated", 1)
            return seat
    there = ", ".join(f"{seat}: {guest.host}" for seat, guest in _guests(store, nodes).items())
    number = f"launch.node_rank={nodes.rank}" if nodes.rank is not None else f"launch.nodes={nodes.count}"
    raise ConfigError(
        f"{number}: taken at {nodes.address} (node {there}). Each node needs a number of its own from 0 to "
        f"{nodes.count - 1} or none, and a run is started on all of its nodes together"
    )


def _await_all(store: dist.Store, nodes: Nodes) -> None:
    waiting = _Waiting(nodes.seconds)
    while store.add("seated", 0) < nodes.count:
        if not waiting.pause(lambda: f"waiting: {_who(store, nodes)}"):
            raise StartupError(
                f"{_who(store, nodes)} within {nodes.seconds:.0f} s. Check that the same command runs on every node, "
                "and that each can reach that address (a firewall, another network)"
            )


def _who(store: dist.Store, nodes: Nodes) -> str:
    guests = _guests(store, nodes)
    missing = [str(seat) for seat in range(nodes.count) if seat not in guests]
    names = ", ".join(guest.host for guest in guests.values())
    said = f"{len(guests)} of {nodes.count} nodes have come to {nodes.address} ({names})"
    return said if nodes.rank is None else f"{said}; missing: launch.node_rank={','.join(missing)}"


def _guests(store: dist.Store, nodes: Nodes) -> dict[int, Guest]:
    """Who sits where."""
    there = [seat for seat in range(nodes.count) if store.check([_seat(seat)])]
    return {seat: Guest(**json.loads(store.get(_seat(seat)))) for seat in there}


def _source(store: dist.Store, nodes: Nodes, seat: int) -> str | None:
    """On the hosting node its own name may mean the loopback address (127.0.1.1): the way to another one tells more."""
    host = nodes.host
    if nodes.hosting:
        others = [guest for number, guest in _guests(store, nodes).items() if number != seat]
        host = next((guest.address for guest in others if guest.address is not None), host)
    return source_address(host, nodes.port)


def _seat(number: int) -> str:
    return f"seat/{number}"
