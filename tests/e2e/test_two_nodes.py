"""launch/multinode.sh on two hosts: what one of them does, the other one ends with, too."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sftdist.core.agent import write_status
from sftdist.core.snapshot import read_config
from sftdist.core.words import word
from sftdist.training.checkpoint import verify
from tests.conftest import ROOT
from tests.e2e.jobs import KEYS, finish, same
from tests.e2e.workshop import status
from tests.hosts import ADDRESSES, HOSTS, Pair, TwoHosts
from tests.scripts import script_variables

pytestmark = pytest.mark.timeout(900)  # several starts of torchrun each, on a machine that may be busy
TERM, KILL = signal.SIGTERM, signal.SIGKILL
ONE_RANK = (*KEYS, "launch.nproc=1", "launch.lost_seconds=8")
STATIC, C10D = f"{ADDRESSES[0]}:29500", f"{HOSTS[0]}:29500"
EACH_RENDEZVOUS = pytest.mark.parametrize("address", [STATIC, C10D])
NOTE = """it's "50%" of a, b {c}: $HOME $$ ${d} \\ end"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as both:
        yield both


class Nodes:
    """Starts of launch/multinode.sh in the folder of `runs/whole`."""

    def __init__(self, hosts: TwoHosts, place: Path, logs: Path) -> None:
        self.hosts = hosts
        self.place = place
        self._logs = logs
        self._starts = 0

    def start(
        self,
        address: str,
        *words: str,
        own: Sequence[Sequence[str]] = ((), ()),
        prefixes: Sequence[Sequence[str]] = ((), ()),
    ) -> Pair:
        """The script on both hosts; the address without a name is given with the number of each node. `own`: words for
        one of them, `prefixes`: a command before that of one."""
        self._starts += 1
        commands = []
        for rank in range(2):
            options = ["--nodes", "2", "--address", address, *(["--node-rank", str(rank)] if address == STATIC else [])]
            script = [*prefixes[rank], "bash", str(ROOT / "launch/multinode.sh")]
            commands.append([*script, *options, *ONE_RANK, *words, *own[rank]])
        logs = self._logs / f"start-{self._starts}"
        return self.hosts.start(commands, self.place, logs, script_variables(self._logs))

    def reached(self, name: str, step: int) -> bool:
        file = self.place / "runs" / name / "metrics.jsonl"
        return file.is_file() and f'"step": {step},' in file.read_text()


@pytest.fixture
def nodes(hosts: TwoHosts, place: Path, tmp_path: Path) -> Nodes:
    return Nodes(hosts, place, tmp_path)


def test_the_very_same_line_on_both(nodes: Nodes) -> None:
    """By c10d and by name, which on the first host means 127.0.1.1; with data that nobody has prepared, and with a
    value that is full of what a shell, Hydra and torchrun read in their own ways."""
    run_dir = nodes.place / "runs/c10d"
    pair = nodes.start(C10D, "run.dir=runs/c10d", "data.store_dir=stores-of-c10d", word("run.note", NOTE))
    assert pair.codes() == [0, 0], pair.texts()
    assert same(nodes.place, "runs/c10d", "runs/whole")
    assert read_config(run_dir).run.note == NOTE
    assert sum(text.count("plan:") for text in pair.texts()) == 1
    assert (run_dir / "export/model.safetensors").is_file()


@pytest.mark.long
def test_a_number_for_each_node(nodes: Nodes) -> None:
    """And a run that is finished is so for every node that looks."""
    for _ in range(2):
        pair = nodes.start(STATIC, "run.dir=runs/static")
        assert pair.codes() == [0, 0], pair.texts()
    assert same(nodes.place, "runs/static", "runs/whole")
    assert all("is finished" in text for text in pair.texts())


@pytest.mark.long
@pytest.mark.parametrize(("address", "told"), [(STATIC, 0), (STATIC, 1), (C10D, 0), (C10D, 1)])
def test_a_stop_of_one_node_stops_both_after_a_save(nodes: Nodes, address: str, told: int) -> None:
    name = f"stopped-{address.partition(':')[0]}-{told}"
    pair = nodes.start(address, f"run.dir=runs/{name}")
    pair.until(lambda: nodes.reached(name, 3))
    pair.processes[told].send_signal(TERM)
    assert pair.codes(120) == [75, 75], pair.texts()
    found = status(nodes.place / "runs" / name)
    assert (found["state"], found["code"]) == ("preempted", 75)
    assert verify(nodes.place / f"runs/{name}/checkpoints/step-{found['step']:08d}") == []
    pair = nodes.start(address, f"run.dir=runs/{name}")
    assert pair.codes() == [0, 0], pair.texts()
    assert same(nodes.place, f"runs/{name}", "runs/whole")


@pytest.mark.long
@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_before_the_ranks_have_met(nodes: Nodes, told: int) -> None:
    """They are in their imports, where they know nothing of each other yet."""
    pair = nodes.start(STATIC, f"run.dir=runs/early-{told}")
    pair.until(lambda: all(nodes.hosts.ranks(host) for host in range(2)))
    pair.processes[told].send_signal(TERM)
    assert pair.codes(60) == [75, 75], pair.texts()
    assert not (nodes.place / f"runs/early-{told}/metrics.jsonl").exists()
    assert "Traceback" not in "".join(pair.texts())


@pytest.mark.long
@EACH_RENDEZVOUS
@pytest.mark.parametrize("host", [0, 1])
def test_a_killed_rank_on_either_host_comes_back(nodes: Nodes, address: str, host: int) -> None:
    name = f"restarted-{address.partition(':')[0]}-{host}"
    pair = nodes.start(address, f"run.dir=runs/{name}", "launch.max_restarts=1")
    pair.until(lambda: nodes.reached(name, 15))
    nodes.hosts.kill(nodes.hosts.ranks(host))
    assert pair.codes() == [0, 0], pair.texts()
    assert sum(text.count("plan:") for text in pair.texts()) == 2
    assert same(nodes.place, f"runs/{name}", "runs/whole")


@pytest.mark.long
@pytest.mark.parametrize("host", [0, 1])
def test_a_rank_that_dies_in_its_imports_ends_both(nodes: Nodes, host: int) -> None:
    """One that a broken installation on one host ends, say. The other one's would wait for it for minutes."""
    pair = nodes.start(STATIC, f"run.dir=runs/imports-{host}")
    pair.until(lambda: bool(nodes.hosts.ranks(host)))
    nodes.hosts.kill(nodes.hosts.ranks(host))
    assert pair.codes(90) == [1, 1], pair.texts()
    assert "died: ended by SIGKILL" in pair.texts()[host]
    assert "sftdist: error:" in pair.texts()[1 - host]


@pytest.mark.long
@EACH_RENDEZVOUS
@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_dies_ends_the_other_with_a_cause(nodes: Nodes, address: str, host: int) -> None:
    name = f"died-{address.partition(':')[0]}-{host}"
    pair = nodes.start(address, f"run.dir=runs/{name}")
    pair.until(lambda: nodes.reached(name, 15))
    nodes.hosts.kill(nodes.hosts.processes(host))
    assert pair.codes(90)[1 - host] == 1
    last = pair.texts()[1 - host].splitlines()[-6:]
    assert any("sftdist: error:" in line for line in last), pair.texts()
    assert status(nodes.place / "runs" / name)["state"] == "failed"
    finish(nodes.place, f"run.dir=runs/{name}")
    assert same(nodes.place, f"runs/{name}", "runs/whole")


@pytest.mark.long
def test_bad_data_is_3_on_both(nodes: Nodes) -> None:
    """Only rank 0 has looked at it."""
    (nodes.place / "bad.jsonl").write_text('{"messages": 5}\n')
    pair = nodes.start(C10D, "run.dir=runs/bad", "data.train=bad.jsonl")
    assert pair.codes() == [3, 3], pair.texts()
    assert sum("bad.jsonl:1" in text for text in pair.texts()) >= 1


@pytest.mark.long
def test_a_configuration_that_one_node_refuses(nodes: Nodes) -> None:
    """The other one waits for it no longer than it was told to, and says for whom."""
    words = ("run.dir=runs/alone", "launch.join_seconds=12")
    write_status(nodes.place / "runs/alone", "preempted", 75, "of an earlier start")
    pair = nodes.start(STATIC, *words, own=((), ("optimizer.lr=-1",)))
    assert pair.codes(120) == [1, 2], pair.texts()
    here, there = pair.texts()
    assert "1 of 2 nodes have come to 10.77.0.1:29500 (host-0); missing: launch.node_rank=1 within 12 s" in here
    assert "optimizer.lr" in there
    assert "Traceback" not in here + there


@pytest.mark.long
def test_two_commands_that_differ_do_not_train_together(nodes: Nodes) -> None:
    pair = nodes.start(C10D, "run.dir=runs/both", "launch.join_seconds=20", own=((), ("train.epochs=3",)))
    codes = pair.codes(120)
    assert sorted(codes) == [1, 2], pair.texts()
    assert "do not run the same" in pair.texts()[codes.index(2)]


@pytest.mark.long
@EACH_RENDEZVOUS
def test_a_port_in_use_is_2_where_it_is_and_a_cause_elsewhere(nodes: Nodes, address: str) -> None:
    listener = nodes.hosts.listen(0, 29500)
    pair = nodes.start(address, "run.dir=runs/port", "launch.join_seconds=10")
    assert pair.codes(120) == [2, 1], pair.texts()
    here, there = pair.texts()
    assert f"port 29500 (Address already in use: process {listener.pid}" in here
    assert "no sftdist run" in there or "no meeting of nodes" in there
    assert not (nodes.place / "runs/port/status.json").exists()


@pytest.mark.long
def test_an_address_that_nobody_owns(nodes: Nodes) -> None:
    pair = nodes.start("10.77.0.9:29500", "run.dir=runs/nowhere", "launch.join_seconds=8")
    assert pair.codes(120) == [1, 1], pair.texts()
    for text, address in zip(pair.texts(), ADDRESSES, strict=True):
        assert "launch.address=10.77.0.9:29500: no meeting of nodes there" in text
        assert f"this host has the addresses {address}" in text


@pytest.mark.long
def test_a_run_directory_that_is_not_shared(nodes: Nodes) -> None:
    """The second host has another one under the same name."""
    run_dir = nodes.place / "runs/unshared"
    run_dir.mkdir()
    own = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {shlex.quote(str(run_dir))} && exec "$@"', "sh")
    pair = nodes.start(STATIC, f"run.dir={run_dir}", prefixes=((), own))
    assert pair.codes(200) == [1, 1], pair.texts()
    assert "on host-1 this is not the directory that rank 0 writes to" in pair.texts()[1]
