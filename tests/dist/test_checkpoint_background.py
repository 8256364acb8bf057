"""Saving in the background: what was there at the save is what is written, and a write that fails is heard of."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import TCPStore

from sftdist.core.distributed import World, session
from sftdist.core.errors import CheckpointError
from sftdist.training import checkpoint, tensor_file
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.checkpoint_files import steps_in, verify
from sftdist.training.engine import Engine, ParameterState
from sftdist.training.retention import Keep
from tests.ranks import context, rank_environment, run_ranks
from tests.training_cases import ADAMW, Case, make_engine, packs_of, train_step

ALONE = World(0, 1, 0, torch.device("cpu"))
CASE = Case(0, optimizer=ADAMW)
State = dict[str, dict[str, torch.Tensor]]


class Gate:
    """Stands in for `save_file`: every write stops here until it is opened; notes how many are inside at once."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.inside = self.most = 0

    def __call__(self, tensors: dict[str, torch.Tensor], path: Path, metadata: None) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.reached.set()
        assert self.open.wait(60)
        save_file(tensors, path)
        self.inside -= 1


@contextmanager
def gated(gate: Gate) -> Iterator[Gate]:
    """The write of every part waits for the gate."""
    before = tensor_file.save_file
    tensor_file.save_file = gate  # type: ignore[assignment]
    try:
        yield gate
    finally:
        gate.open.set()
        tensor_file.save_file = before


def trained(world: World, case: Case = CASE, steps: int = 1) -> Engine:
    engine = make_engine(case, world)
    for step in range(steps):
        train_step(engine, world, packs_of(step), 1e-2)
    return engine


def in_background(folder: Path, world: World = ALONE, keep: int = 3) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", Keep(keep), background=world.beside())


def state_of(engine: Engine) -> State:
    return {name: {key: tensor.clone() for key, tensor in tensors.items()} for name, tensors in engine.state()}


def same(one: State, two: State) -> bool:
    return all(torch.equal(one[name][key], two[name][key]) for name in one for key in one[name])


def save_and_train_on(engine: Engine, world: World, checkpoints: Checkpoints, folder: Path) -> dict[str, Any]:
    """Save after step 1, go on for two steps (and change all else that was saved) before anything can be written.

    Returns what a load gives back beside the state of the engine, and whether that is as it was at the save.
    """
    torch.manual_seed(5 + world.rank)
    saved, position = state_of(engine), {"cursor": [1, 2]}
    expected_random = torch.get_rng_state()
    with gated(Gate()) as gate:
        checkpoints.save(engine, {"data": position}, 1)
        for step in (1, 2):
            train_step(engine, world, packs_of(step), 1e-2)
        position["cursor"].append(3)
        torch.manual_seed(99)
        assert gate.reached.wait(60)
        assert steps_in(folder / "checkpoints") == []
        gate.open.set()
        checkpoints.wait()
    loaded = Checkpoints(folder / "checkpoints", Keep()).load_latest(engine, say=lambda line: None)
    assert loaded is not None
    return {
        "data": loaded["data"],
        "updates": engine.updates,
        "random": torch.equal(torch.get_rng_state(), expected_random),
        "state": same(saved, state_of(engine)),
    }


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    found = save_and_train_on(trained(ALONE), ALONE, in_background(tmp_path), tmp_path)
    assert found == {"data": {"cursor": [1, 2]}, "updates": 1, "random": True, "state": True}


def test_a_save_that_keeps_references_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure above rejects a save that hands the live tensors to the thread."""

    def references(engine: Engine, *limits: int) -> Iterator[ParameterState]:
        return engine.state()

    monkeypatch.setattr(checkpoint, "_own_pieces", references)
    found = save_and_train_on(trained(ALONE), ALONE, in_background(tmp_path), tmp_path)
    assert not found["state"]


def test_both_modes_write_the_same_bytes(tmp_path: Path) -> None:
    engine = trained(ALONE)
    checkpoints = in_background(tmp_path / "one")
    one = checkpoints.save(engine, {"data": 1}, 1)
    checkpoints.wait()
    two = Checkpoints(tmp_path / "two" / "checkpoints", Keep()).save(engine, {"data": 1}, 1)
    assert verify(one) == verify(two) == []
    assert (tmp_path / "one" / "LATEST").read_text() == (tmp_path / "two" / "LATEST").read_text()
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in two.glob("*.safetensors"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_at_most_one_save_is_under_way(tmp_path: Path) -> None:
    engine, checkpoints = trained(ALONE), in_background(tmp_path)
    with gated(Gate()) as gate:
        checkpoints.save(engine, {}, 1)
        assert gate.reached.wait(60)
        threading.Timer(0.3, gate.open.set).start()
        checkpoints.save(engine, {}, 2)
        assert gate.open.is_set(), "the second save began while the first was being written"
        assert 1 in steps_in(tmp_path / "checkpoints")
        checkpoints.save(engine, {}, 3)
        checkpoints.wait()
    assert gate.most == 1
    assert sorted(steps_in(tmp_path / "checkpoints")) == [1, 2, 3]
    assert (tmp_path / "LATEST").read_text() == "checkpoints/step-00000003\n"


def until_failed(checkpoints: Checkpoints) -> None:
    deadline = time.monotonic() + 60
    while not checkpoints.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["wait", "save"])
def test_a_write_that_failed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    engine, checkpoints = trained(ALONE), in_background(tmp_path)
    first = checkpoints.save(engine, {}, 1)
    checkpoints.wait()
    assert not checkpoints.failed

    def full(tensors: Any, path: Path, metadata: None) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "save_file", full)
        checkpoints.save(engine, {}, 2)
        until_failed(checkpoints)
    with pytest.raises(CheckpointError, match=r"rank 0: .*part-00000-00.*No space left"):
        checkpoints.wait() if how == "wait" else checkpoints.save(engine, {}, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [first.name]
    assert verify(first) == []
    assert not checkpoints.failed, "it was reported"


def test_a_fault_of_ours_is_not_silent_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, checkpoints = trained(ALONE), in_background(tmp_path)
    monkeypatch.setattr(checkpoint, "write_manifest", lambda temp, known: 1 / 0)
    checkpoints.save(engine, {}, 1)
    until_failed(checkpoints)
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()


def on_two_ranks(world: World, folder: Path) -> tuple[dict[str, Any], list[bool], str, list[str]]:
    """Train on during a held save; then one whose write rank 1 cannot finish, which both have to hear of."""
    engine = trained(world, replace(CASE, stage=2))
    checkpoints = in_background(folder, world)
    found = save_and_train_on(engine, world, checkpoints, folder)

    def broken(tensors: Any, path: Path, metadata: None) -> None:
        raise OSError(5, "Input/output error")

    with gated(Gate()) as gate:
        if world.rank == 1:
            tensor_file.save_file = broken  # type: ignore[assignment]
        checkpoints.save(engine, {}, 2)
        before = checkpoints.failed
        gate.open.set()
        train_step(engine, world, packs_of(3), 1e-2)  # the main world is free for other collectives meanwhile
        until_failed(checkpoints)
    message = ""
    try:
        checkpoints.wait()
    except CheckpointError as error:
        message = str(error)
    engine.close()
    return found, [before, checkpoints.failed], message, os.listdir(folder / "checkpoints")


def test_two_ranks_train_on_and_hear_of_a_failure(tmp_path: Path) -> None:
    for found, failed, message, left in run_ranks(on_two_ranks, 2, tmp_path):
        assert found == {"data": {"cursor": [1, 2]}, "updates": 1, "random": True, "state": True}
        assert failed == [False, False]
        assert "rank 1" in message
        assert "Input/output error" in message
        assert left == ["step-00000001"]


def ends_while_writing(rank: int, port: int, folder: Path, how: str, pipe: Connection) -> None:
    """Save step 1; say "held" when the write of step 2 is held on every rank, and wait for the word to end as told."""
    os.environ.update(rank_environment(rank, 2, port))
    torch.set_num_threads(1)
    with session() as world:
        engine = trained(world)
        checkpoints = in_background(folder, world)
        checkpoints.save(engine, {"which": "whole"}, 1)
        checkpoints.wait()
        gate = Gate()
        tensor_file.save_file = gate  # type: ignore[assignment]
        checkpoints.save(engine, {"which": "torn"}, 2)
        assert gate.reached.wait(60)
        world.barrier()
        pipe.send("held")
        pipe.recv()
        if rank == 1 and how == "raise":
            raise OSError("this rank cannot go on")
        world.barrier()


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_ends_during_a_write_takes_the_others_along(tmp_path: Path, how: str) -> None:
    """No rank waits for a thread that waits for a peer; what was half-written is never taken, and is cleaned up."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank in range(2):
        mine, theirs = context.Pipe()
        process = context.Process(target=ends_while_writing, args=(rank, store.port, tmp_path, how, theirs))
        process.start()
        ranks.append((process, mine))
    try:
        assert [pipe.poll(60) and pipe.recv() for _, pipe in ranks] == ["held", "held"]
        assert len(list((tmp_path / "checkpoints").glob(".step-00000002.*.tmp"))) == 1
        if how == "kill":
            ranks[1][0].kill()
        for _, pipe in ranks[: 1 if how == "kill" else 2]:
            pipe.send("end")
        started = time.monotonic()
        for process, _ in ranks:
            process.join(30)
        assert all(process.exitcode not in (0, None) for process, _ in ranks)
        assert time.monotonic() - started < 10
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    engine = make_engine(CASE, ALONE)
    said: list[str] = []
    loaded = in_background(tmp_path).load_latest(engine, said.append)
    assert loaded is not None
    assert loaded["which"] == "whole"
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    assert len(said) == 1
    assert said[0].startswith("resuming from step 1, saved ")
    assert said[0].endswith("2 ranks at ZeRO 0 in fp32; this run has 1 rank at ZeRO 0 in fp32")


def test_waiting_for_a_long_write_gets_on_file_by_file(tmp_path: Path) -> None:
    """The hang watch sees a write that takes long, file by file, and one that hangs, too."""
    engine = trained(ALONE)
    checkpoints = Checkpoints(tmp_path / "checkpoints", Keep(1), background=ALONE, part_bytes=4096)
    with gated(Gate()) as gate:
        checkpoints.save(engine, {}, 1)
        assert gate.reached.wait(60)
        before = ALONE.progress.now.count
        threading.Timer(0.5, gate.open.set).start()
        checkpoints.wait()
    files = len(list((tmp_path / "checkpoints/step-00000001").glob("part-*")))
    noted = ALONE.progress.now.count - before
    assert files > 3
    assert 1 < noted <= files + 1
