"""A7, A11, A12: checkpoints are whole or not there, verified before use, and pruned in the order of their steps."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sftdist.core import storage
from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import read_json, write_json, write_manifest
from sftdist.training import checkpoint_files, tensor_file
from sftdist.training.checkpoint import Checkpoints, checkpoint_bytes, resumption
from sftdist.training.checkpoint_files import age, checkpoints_in, deal, find, read_tensors, steps_in, verify
from sftdist.training.engine import Engine
from sftdist.training.retention import Keep, Standing
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


def test_each_file_is_flushed_and_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large model are hundreds of gigabytes. And all are as readable as the umask says."""
    calls = Counter[tuple[str, str]]()
    for module, name in (
        (storage, "fsync"),
        (storage, "sha256_file"),
        (tensor_file, "fsync"),
        (tensor_file, "sha256_file"),
    ):
        original = getattr(module, name)

        def counted(path: Path, name: str = name, original: Any = original) -> Any:
            calls[name, path.name] += 1
            return original(path)

        monkeypatch.setattr(module, name, counted)
    path = Checkpoints(tmp_path / "checkpoints", Keep(), part_bytes=4096).save(trained(), {}, 1)
    files = [file.name for file in path.glob("*.safetensors")]
    assert len(files) > 2
    assert {calls[name, file] for name in ("fsync", "sha256_file") for file in files} == {1}
    assert {file.stat().st_mode for file in path.iterdir()} == {(path / "manifest.json").stat().st_mode}


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
    checkpoints = Checkpoints(folder, Keep(1, every=100, best=lambda: Standing(losses)))
    for step, loss in ((10, 3.0), (100, 2.5), (110, 1.0), (120, 1.0), (130, 1.5)):
        checkpoints.save(engine, {}, step)
        losses[step] = loss  # a checkpoint is evaluated after it was written
    assert sorted(steps_in(folder)) == [100, 110, 130]
    assert find(tmp_path, "best", Standing(losses)) == folder / "step-00000110"
    assert find(tmp_path, "latest", Standing()) == folder / "step-00000130"
    assert find(tmp_path, "100", Standing()) == folder / "step-00000100"
    for which, known in (("120", losses), ("best", {}), ("newest", losses)):
        with pytest.raises(CheckpointError, match=rf"step={which}: .*100.*, 110.*, 130"):
            find(tmp_path, which, Standing(known))
    with pytest.raises(CheckpointError, match="there is none"):
        find(tmp_path / "elsewhere", "latest", Standing(losses))


def test_every_changed_byte_of_the_manifest_is_named(tmp_path: Path) -> None:
    """At all positions: a key, a name, a size, a digit of a hash (tests/unit/core/test_storage.py has more bytes)."""
    path = Checkpoints(tmp_path / "checkpoints", Keep()).save(trained(), {}, 1)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for place, byte in enumerate(content):
        manifest.write_bytes(content[:place] + bytes([byte ^ 1]) + content[place + 1 :])
        problems = verify(path)
        assert any("manifest.json" in problem for problem in problems), (place, byte)
    manifest.write_bytes(content)
    assert verify(path) == []


def test_a_changed_byte_in_any_file_is_found_and_walked_back_from(tmp_path: Path) -> None:
    engine, folder = trained(), tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, Keep(2))
    old = weights_of(engine)
    checkpoints.save(engine, {"which": "old"}, 1)
    train_step(engine, ALONE, packs_of(1), 1e-2)
    newest = checkpoints.save(engine, {"which": "new"}, 2)
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for place in (0, 8, len(content) // 3, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert any(path.name in problem for problem in verify(newest)), (path.name, place)
        said: list[str] = []
        resumed = make_engine(CASE, ALONE)
        state = checkpoints.load_latest(resumed, say=said.append)
        assert state is not None
        assert state["which"] == "old", path.name
        assert path.name in said[0]
        assert all((value == old[name]).all() for name, value in weights_of(resumed).items())
        path.write_bytes(content)
    assert verify(newest) == []


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Without the rights of root, for whom no directory is closed; `folder` is reached as the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        os.chdir(before)


def test_what_is_no_checkpoint_is_named_and_walked_back_from(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints, engine = Checkpoints(folder, Keep(9)), trained()
    checkpoints.save(engine, {"which": "whole"}, 1)
    closed = checkpoints.save(engine, {}, 2)
    (folder / "step-00000003").mkdir()
    (folder / "step-00000004").write_text("a file")
    checkpoints.save(engine, {}, 5)
    (folder / "step-00000005" / "state.json").chmod(0)
    said: list[str] = []
    closed.chmod(0)
    with as_nobody(tmp_path):
        state = Checkpoints(Path("checkpoints"), Keep()).load_latest(engine, say=said.append)
        assert [info.step for info in checkpoints_in(Path("checkpoints"))] == [1, 2, 3, 4, 5]
    closed.chmod(0o755)
    assert state is not None
    assert state["which"] == "whole"
    reasons = [
        "state.json: unreadable (Permission denied)",
        "Not a directory",
        "never published whole",
        "Permission denied",
    ]
    assert len(said) == len(reasons) + 1
    for line, step, reason in zip(said, (5, 4, 3, 2), reasons, strict=False):
        assert f"step-0000000{step}" in line
        assert reason in line
    checkpoints.save(engine, {}, 2)
    assert sorted(steps_in(folder)) == [1, 2], "what is out of date goes, be it a file"
    assert verify(closed) == []


def test_a_folder_that_cannot_be_read_is_no_new_run(tmp_path: Path) -> None:
    """Else the run would begin again from step 0."""
    engine, folder = trained(), tmp_path / "checkpoints"
    Checkpoints(folder, Keep()).save(engine, {}, 1)
    folder.chmod(0)
    with as_nobody(tmp_path), pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
        Checkpoints(Path("checkpoints"), Keep()).load_latest(engine)
    folder.chmod(0o755)


def test_a_kill_between_the_renaming_and_LATEST(tmp_path: Path) -> None:
    """The newest is whole and is taken; nothing is walked back from, and the next save leaves it alone."""
    engine, folder, said = trained(), tmp_path / "checkpoints", list[str]()
    checkpoints = Checkpoints(folder, Keep(3))
    checkpoints.save(engine, {"which": "old"}, 1)
    latest = (tmp_path / "LATEST").read_text()
    checkpoints.save(engine, {"which": "new"}, 2)
    (tmp_path / "LATEST").write_text(latest)
    (tmp_path / ".LATEST.0123abcd.tmp").write_text("checkpoints/step-000")
    state = checkpoints.load_latest(engine, say=said.append)
    assert state is not None
    assert state["which"] == "new"
    assert len(said) == 1
    checkpoints.save(engine, {}, 3)
    assert sorted(steps_in(folder)) == [1, 2, 3]
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "checkpoints"]


@pytest.mark.parametrize("verb", ["save", "load"])
def test_what_earlier_starts_left_is_swept(tmp_path: Path, verb: str) -> None:
    """Of any step and any host: the run directory is locked, so nobody writes there. A sweep of this host's dead
    processes, for the same step, would leave them all."""
    engine, folder = trained(), tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, Keep())
    checkpoints.save(engine, {}, 1)
    for name in ("step-00000002.@elsewhere@1@0123abcd", f"step-00000001.@{os.uname().nodename}@{os.getpid()}@89ab"):
        (folder / f".{name}.tmp").mkdir()
        (folder / f".{name}.tmp" / "part-00000-00.safetensors").write_bytes(bytes(100))
    (folder / "notes.txt").write_text("a user's own")
    checkpoints.save(engine, {}, 3) if verb == "save" else checkpoints.load_latest(engine, say=lambda line: None)
    steps = ["step-00000001", "step-00000003"] if verb == "save" else ["step-00000001"]
    assert sorted(os.listdir(folder)) == ["notes.txt", *steps]


def test_a_resumed_run_says_from_where(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", Keep())
    checkpoints.save(trained(), {}, 120)
    checkpoints.load_latest(trained(), say=said.append)
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    assert re.fullmatch(rf"resuming from step 120, saved {moment} \(\d+ s ago\)", said[0])
    header = {"step": 7, "saved_at": time.time() - 7300.0}
    saved = {"world_size": 4, "stage": 2, "precision": "bf16"}
    line = resumption({**header, "shape": saved}, {**saved, "world_size": 2, "stage": 3}, time.time())
    assert line.endswith("(2 h ago) on 4 ranks at ZeRO 2 in bf16; this run has 2 ranks at ZeRO 3 in bf16")
    assert [age(seconds) for seconds in (-5, 59, 150, 86400)] == ["1 s", "59 s", "2 min", "1 d"]


def opened_files(world: World, folder: str) -> tuple[bool, list[str]]:
    """Whether this rank has loaded what was saved, and which of the parameters' files it has opened for that."""
    engine = make_engine(CASE, world)
    opened: list[str] = []

    def noted(path: Path, framework: str) -> Any:
        opened.append(path.name)
        return safe_open(path, framework)

    checkpoint_files.safe_open = noted  # type: ignore[misc, assignment]
    loaded = Checkpoints(Path(folder) / "checkpoints", Keep()).load_latest(engine, say=lambda line: None)
    assert loaded is not None
    path, mine = Path(loaded["checkpoint"]["path"]), list(opened)
    index = read_json(path / "state.json")["parameters"]
    saved = dict(read_tensors(path, index, index))
    same = [torch.equal(saved[name][key], tensors[key]) for name, tensors in engine.state() for key in tensors]
    engine.close()
    return all(same), mine


def test_each_file_is_read_by_one_rank(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path / "checkpoints", Keep(), part_bytes=4096).save(trained(), {}, 1)
    (same, one), (same_there, two) = run_ranks(opened_files, 2, str(tmp_path))
    assert same
    assert same_there
    assert sorted(one + two) == sorted(file.name for file in path.glob("part-*"))
    assert min(len(one), len(two)) > 1


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


def test_a_later_checkpoint_that_was_passed_over_is_set_aside(tmp_path: Path) -> None:
    """A disk may fail for a moment: the newest checkpoint is not lost before the run is as far again."""
    engine, checkpoints = trained(), Checkpoints(tmp_path / "checkpoints", Keep(1))
    checkpoints.save(engine, {}, 1)
    kept = Checkpoints(tmp_path / "checkpoints", Keep(2))
    kept.save(engine, {}, 4)
    (tmp_path / "checkpoints/step-00000004/rng.safetensors").rename(tmp_path / "away")
    said: list[str] = []
    assert kept.load_latest(engine, said.append) is not None
    kept.save(engine, {}, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000003",
        "step-00000004.passed-over",
    ]
    assert sorted(steps_in(tmp_path / "checkpoints")) == [1, 3], "it is none to resume from"
    kept.save(engine, {}, 4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_what_an_earlier_walk_back_has_set_aside_is_in_nobodys_way(tmp_path: Path) -> None:
    """A kill may come between a checkpoint and the removal of its predecessor under the other name."""
    engine, checkpoints = trained(), Checkpoints(tmp_path / "checkpoints", Keep(2))
    for step in (1, 4):
        checkpoints.save(engine, {}, step)
    broken, aside = (tmp_path / "checkpoints" / f"step-00000004{ending}" for ending in ("", ".passed-over"))
    shutil.copytree(broken, aside)
    foreign = tmp_path / "checkpoints" / "step-of-mine.passed-over"
    foreign.mkdir()
    (broken / "state.json").write_text("{")
    assert checkpoints.load_latest(engine, lambda line: None) is not None
    checkpoints.save(engine, {}, 3)
    assert (aside / "state.json").read_text() == "{", "the newer one took its place"
    assert sorted(steps_in(tmp_path / "checkpoints")) == [1, 3]
    checkpoints.save(engine, {}, 4)
    assert not aside.exists()
    assert foreign.exists()


def test_checkpoints_that_have_vanished_are_no_new_run(tmp_path: Path) -> None:
    """The folder may be on a disk that is not mounted: training from the start would cut the run's figures."""
    engine, checkpoints = trained(), Checkpoints(tmp_path / "checkpoints", Keep(1))
    checkpoints.save(engine, {}, 1)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"LATEST names checkpoints/step-00000001, but .* holds no checkpoint"):
        checkpoints.load_latest(engine)
    (tmp_path / "LATEST").unlink()
    assert checkpoints.load_latest(engine) is None
