"""A7, A11, A12: checkpoints are whole or not there, verified before use, and pruned in the order of their steps."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import read_json, write_json, write_manifest
from sftdist.training.checkpoint import Checkpoints, checkpoint_bytes
from sftdist.training.checkpoint_files import checkpoints_in, deal, find, steps_in, verify
from sftdist.training.engine import Engine
from sftdist.training.retention import Keep
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, SGD, Case, make_engine, packs_of, train_step, weights_of

ALONE = World(0, 1, 0, torch.device("cpu"))
CASE = Case(0, optimizer=ADAMW)


def trained(case: Case = CASE, steps: int = 1) -> Engine:
    engine = make_engine(case, ALONE)
    for step in range(steps):
        train_step(engine, ALONE, packs_of(step), 1e-2)
    return engine


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A disk that is full: writes beyond `limit` bytes of a file fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_parameters_are_dealt_by_size() -> None:
    shapes = {f"p{n}": torch.Size([size]) for n, size in enumerate([100, 1, 50, 50, 2, 3])}
    owners = deal(shapes, 2)
    loads = [sum(shapes[name].numel() for name, owner in owners.items() if owner == rank) for rank in (0, 1)]
    assert max(loads) <= 104
    assert owners == deal(dict(reversed(shapes.items())), 2)


def test_saved_and_loaded_state_is_the_same(tmp_path: Path) -> None:
    engine = trained(steps=2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", Keep(2), part_bytes=4096)
    path = checkpoints.save(engine, {"data": {"cursor": [1, 2]}}, 2)
    assert (tmp_path / "LATEST").read_text() == "checkpoints/step-00000002\n"
    assert len(list(path.glob("part-*"))) > 1
    assert verify(path) == []
    other = make_engine(CASE, ALONE)
    state = checkpoints.load_latest(other)
    assert state is not None
    assert state["data"] == {"cursor": [1, 2]}
    assert other.updates == 2
    for one, two in zip(engine.state(), other.state(), strict=True):
        assert one.name == two.name
        assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors)


def test_nothing_to_load(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", Keep(1)).load_latest(trained(steps=0)) is None


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    engine, checkpoints = trained(), Checkpoints(tmp_path / "checkpoints", Keep(2))
    for step in (9, 10, 100):
        checkpoints.save(engine, {}, step)
    assert sorted(steps_in(tmp_path / "checkpoints")) == [10, 100]
    infos = checkpoints_in(tmp_path / "checkpoints")
    assert [info.step for info in infos] == [10, 100]
    assert infos[0].bytes > checkpoint_bytes(engine) > 0
    assert (infos[0].world_size, infos[0].stage) == (1, 0)


def test_keeps_the_best_and_every_hundredth(tmp_path: Path) -> None:
    engine, folder = trained(), tmp_path / "checkpoints"
    losses: dict[int, float] = {}
    checkpoints = Checkpoints(folder, Keep(1, every=100, best=lambda: losses))
    for step, loss in ((10, 3.0), (100, 2.5), (110, 1.0), (120, 1.0), (130, 1.5)):
        checkpoints.save(engine, {}, step)
        losses[step] = loss  # a checkpoint is evaluated after it was written
    assert sorted(steps_in(folder)) == [100, 110, 130]
    assert find(tmp_path, "best", losses) == folder / "step-00000110"
    assert find(tmp_path, "latest", {}) == folder / "step-00000130"
    assert find(tmp_path, "100", {}) == folder / "step-00000100"
    for which, known in (("120", losses), ("best", {}), ("newest", losses)):
        with pytest.raises(CheckpointError, match=rf"checkpoint={which}: .*100.*, 110.*, 130"):
            find(tmp_path, which, known)
    with pytest.raises(CheckpointError, match="there is none"):
        find(tmp_path / "elsewhere", "latest", losses)


def test_a_flipped_byte_in_any_file_is_found_and_walked_back_from(tmp_path: Path) -> None:
    engine, folder = trained(), tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, Keep(2))
    old = weights_of(engine)
    checkpoints.save(engine, {"which": "old"}, 1)
    train_step(engine, ALONE, packs_of(1), 1e-2)
    newest = checkpoints.save(engine, {"which": "new"}, 2)
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        said: list[str] = []
        resumed = make_engine(CASE, ALONE)
        state = checkpoints.load_latest(resumed, say=said.append)
        assert state is not None
        assert state["which"] == "old", path.name
        assert path.name in said[0]
        assert all((value == old[name]).all() for name, value in weights_of(resumed).items())
        path.write_bytes(content)
    assert verify(newest) == []


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", Keep(1))
    path = checkpoints.save(trained(), {}, 1)
    (path / "rng.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rng\.safetensors"):
        checkpoints.load_latest(make_engine(CASE, ALONE), say=lambda line: None)


def test_a_step_that_did_not_verify_is_written_again(tmp_path: Path) -> None:
    engine, checkpoints = trained(), Checkpoints(tmp_path / "checkpoints", Keep(1))
    path = checkpoints.save(engine, {}, 1)
    (path / "state.json").write_text("{")
    checkpoints.save(engine, {}, 1)
    assert verify(path) == []


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    engine, checkpoints = trained(), Checkpoints(tmp_path / "checkpoints", Keep(1))
    first = checkpoints.save(engine, {}, 1)
    with file_size_limit(20_000), pytest.raises(CheckpointError, match=r"rank 0: .*part-00000"):
        checkpoints.save(engine, {}, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert verify(first) == []
    assert (tmp_path / "LATEST").read_text() == "checkpoints/step-00000001\n"


def one_full_disk(world: World, folder: str) -> tuple[str, list[str]]:
    engine = make_engine(replace(CASE, stage=2), world)
    train_step(engine, world, packs_of(0), 1e-2)
    checkpoints = Checkpoints(Path(folder) / "checkpoints", Keep(1))
    checkpoints.save(engine, {}, 1)
    message = ""
    try:
        with file_size_limit(10_000 if world.rank == 1 else resource.RLIM_INFINITY):
            checkpoints.save(engine, {}, 2)
    except CheckpointError as error:
        message = str(error)
    return message, [path.name for path in (Path(folder) / "checkpoints").iterdir()]


def test_one_rank_that_cannot_write_stops_all(tmp_path: Path) -> None:
    for message, left in run_ranks(one_full_disk, 2, str(tmp_path)):
        assert "rank 1" in message
        assert left == ["step-00000001"]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        (replace(CASE, optimizer=SGD), "optimizer.name"),
        (replace(CASE, family="llama"), "lacks 1 trainable"),
        (replace(CASE, changes={"intermediate_size": 32}), "no trainable parameter"),
    ],
)
def test_another_model_or_optimizer_is_refused(tmp_path: Path, case: Case, named: str) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", Keep(1))
    checkpoints.save(trained(), {}, 1)
    with pytest.raises(CheckpointError, match=named):
        checkpoints.load_latest(make_engine(case, ALONE))


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = {"path": "base", "revision": None, "sha256": "a" * 64}
    Checkpoints(tmp_path / "checkpoints", Keep(1), base=base).save(trained(), {}, 1)
    with pytest.raises(CheckpointError, match=r"model\.path"):
        Checkpoints(tmp_path / "checkpoints", Keep(1), base={**base, "sha256": "b" * 64}).load_latest(trained())


def test_another_format_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", Keep(1))
    path = checkpoints.save(trained(), {}, 1)
    state = read_json(path / "state.json")
    assert state["format"] == 1
    write_json(path / "state.json", {**state, "format": 2})
    write_manifest(path)
    with pytest.raises(CheckpointError, match="reads format 1"):
        checkpoints.load_latest(trained())
