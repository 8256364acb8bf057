from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sftdist.core.distributed import STOP_SIGNALS, StopSignal, World, ignore_stop_signals, session, share_text
from tests.conftest import ROOT
from tests.ranks import RankError, run_ranks


def _collectives(world: World) -> tuple[object, ...]:
    rank, mine = world.rank, torch.full((2, 3), float(world.rank + 1))
    total = world.all_reduce_sum(mine)
    return (
        total.tolist(),
        mine.tolist(),
        world.all_reduce_max(float(-rank)),
        world.gather_objects({"rank": rank}),
        world.broadcast_object(["from", rank]),
        world.agree(True),
        world.agree(rank != 1),
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size: int) -> None:
    results = run_ranks(_collectives, size)
    assert len(results) == size
    for rank, (total, mine, largest, gathered, given, yes, no) in enumerate(results):
        assert total == [[size * (size + 1) / 2] * 3] * 2
        assert mine == [[rank + 1.0] * 3] * 2, "the argument is left alone"
        assert largest == 0.0
        assert gathered == [{"rank": other} for other in range(size)]
        assert given == ["from", 0]
        assert yes is True
        assert no is (size == 1)


def test_one_process_has_a_process_group_and_no_partners() -> None:
    with session(device=torch.device("cpu")) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert torch.distributed.is_initialized(), "DeepSpeed needs one"
        assert world.gather_objects(3) == [3]
    with session(device=torch.device("cpu")) as again:
        assert again.all_reduce_max(2.0) == 2.0


def _sessions_one_after_another(world: World) -> list[float]:
    found = [world.all_reduce_max(float(world.rank))]
    for _ in range(2):
        with session() as again:
            found.append(again.all_reduce_max(float(again.rank)))
    return found


def test_a_script_may_hold_several_sessions() -> None:
    assert run_ranks(_sessions_one_after_another, 2) == [[1.0, 1.0, 1.0]] * 2


def _raise_on_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("only here")
    world.barrier()


def test_run_ranks_shows_the_first_failing_rank() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed[\s\S]*ValueError: only here"):
        run_ranks(_raise_on_one, 2)


def _signalled(world: World) -> tuple[bool, bool, bool]:
    stop = StopSignal()
    stop.install()
    before = stop.agreed(world)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return before, stop.requested, stop.agreed(world)


def test_a_signal_to_one_rank_stops_all() -> None:
    assert run_ranks(_signalled, 2) == [(False, False, True), (False, True, True)]


STOPS_AT_ONCE = [[signal.SIGINT, signal.SIGINT], [signal.SIGINT, signal.SIGTERM]]
GOES_ON = [
    [signal.SIGTERM, signal.SIGTERM, signal.SIGTERM],
    [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2],
    [signal.SIGTERM, signal.SIGINT],
]


@pytest.mark.parametrize("signals", STOPS_AT_ONCE)
def test_a_second_interrupt_ends_even_a_blocked_process(tmp_path: Path, signals: list[int]) -> None:
    pid = _blocked_process(tmp_path)
    os.kill(pid, signals[0])
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the first one only asks"
    os.kill(pid, signals[1])
    assert _exit_code(pid, 5) == 130
    assert (tmp_path / "aborted").exists()


@pytest.mark.parametrize("signals", GOES_ON)
def test_other_repetitions_do_not_cut_a_save_short(tmp_path: Path, signals: list[int]) -> None:
    pid = _blocked_process(tmp_path)
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.1)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    assert _exit_code(pid, 5) == -signal.SIGKILL


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    stop.install()
    assert signal.getsignal(signal.SIGTERM) != before
    stop.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_rank_that_is_done_is_not_ended_by_a_repeated_signal() -> None:
    """torchrun would call a rank that a signal has ended a failure, after a good save."""
    pid = os.fork()
    if pid == 0:
        ignore_stop_signals()
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        os._exit(0)
    assert _exit_code(pid, 5) == 0


def test_share_text_without_ranks_is_the_text() -> None:
    assert share_text("key", "value") == "value"


def test_share_text_under_torchrun_and_after_a_restart(tmp_path: Path) -> None:
    done = _torchrun(["--max-restarts", "1"], "share", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    expected = {0: "attempt 0|attempt 0 again", 1: "attempt 1|attempt 1 again"}
    assert found == {f"{attempt}-{rank}": expected[attempt] for attempt in (0, 1) for rank in (0, 1)}


@pytest.mark.long
def test_a_killed_rank_brings_two_hosts_back_with_one_restart(tmp_path: Path) -> None:
    """Each host's torchrun counts for itself: the one whose rank lives only sees that the other host joins again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--local-addr", "127.0.0.1"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *rendezvous]
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    notes = tmp_path / "notes"
    notes.mkdir()
    hosts = []
    for log in logs:
        with log.open("wb") as file:
            words = [*command, "-m", "tests.children", "once", str(notes)]
            hosts.append(subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [host.wait(240) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    found = {path.name: path.read_text() for path in notes.iterdir()}
    assert found == {**dict.fromkeys("01", "start 0\nstart 1\n"), "done-0": "0", "done-1": "1"}


@pytest.mark.long
def test_a_failing_rank_ends_the_others_within_seconds() -> None:
    done = _torchrun([], "fail", "raise")
    assert done.returncode == 1
    assert done.seconds < 30
    assert done.stderr.count("TrainingError: the loss of rank 1 is not finite") == 1


def test_a_killed_rank_ends_the_others_and_is_named_once() -> None:
    done = _torchrun([], "fail", "kill")
    assert done.returncode == 1
    assert done.seconds < 30
    said = re.findall(r"^sftdist: error: rank \d.*", done.stderr, re.MULTILINE)
    assert len(said) == 1
    assert re.search(r"rank 1 on .* died .*: it ended without a word", said[0])
    assert f"PeerError: {said[0]}" in done.stderr, "torchrun's own table shows it, too"


def test_a_wrong_key_is_said_once_for_all_ranks() -> None:
    done = _torchrun([], "configured", "+exp=quickstart", "+optimizer.learning_rate=1", "zero.stage=7")
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if "optimizer.lr" in line or "zero.stage" in line]
    assert len([line for line in ours if not line.startswith(" ")]) == 2, done.stderr
    assert done.stderr.count("sftdist children: error:") == 1


def test_all_ranks_get_the_configuration_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """`${now:...}` would differ between ranks that compose for themselves."""
    done = _torchrun([], "configured", "+exp=quickstart", "run.note=note-${now:%f}")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"rank (\d) has note-(\d+)", done.stdout)
    assert sorted(rank for rank, _ in names) == ["0", "1"]
    assert len({name for _, name in names}) == 1


class _Done:
    def __init__(self, process: subprocess.CompletedProcess[str], seconds: float) -> None:
        self.returncode, self.stdout, self.stderr = process.returncode, process.stdout, process.stderr
        self.seconds = seconds


def _torchrun(options: list[str], *words: str) -> _Done:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    began = time.monotonic()
    process = subprocess.run(
        [*command, "-m", "tests.children", *words], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    return _Done(process, time.monotonic() - began)


def _blocked_process(folder: Path) -> int:
    """A fork that holds the signals and computes in C for a minute, where Python runs no handler."""
    ready = folder / "ready"

    def child() -> None:
        StopSignal(on_abort=(folder / "aborted").touch).install()
        ready.touch()
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)

    pid = _fork(child)
    while not ready.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    return pid


def _fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(99)
    return pid


def _exit_code(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still running after {seconds} s")
