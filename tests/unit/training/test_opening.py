"""Opening a run directory: what was refused once stays refused, and the reason stays on file."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from sftdist.core import agent
from sftdist.core.config import compose
from sftdist.core.distributed import World
from sftdist.core.errors import DataError, StartupError
from sftdist.core.start import START_VARIABLE, this_start
from sftdist.data.manifest import read_manifest
from sftdist.data.pipeline import Prepared
from sftdist.training.opening import NotRestarted, open_run, require_shared
from tests.ranks import run_ranks


def never() -> Prepared:
    raise AssertionError("the data is not looked at")


def unreadable() -> Prepared:
    raise DataError("no row can be read")


@pytest.mark.parametrize(("code", "retry"), [(1, False), (3, True)])
def test_a_refused_restart_keeps_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, retry: bool
) -> None:
    """A second refusal that overwrote the first would let the third start train over a non-finite stop."""
    agent.write_status(tmp_path, "failed", code, "why it ended", retry=retry)
    before = agent.read_status(tmp_path)
    cfg = compose("full", ["model.path=x", "data.train=y"])
    for attempt in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with ExitStack() as stack, pytest.raises(NotRestarted, match="why it ended"):
            open_run(cfg, tmp_path, stack, never)
        assert agent.read_status(tmp_path) == before


def test_bad_data_stands_in_the_status_with_its_code(tmp_path: Path) -> None:
    cfg = compose("full", ["model.path=x", "data.train=y"])
    with ExitStack() as stack, pytest.raises(DataError):
        open_run(cfg, tmp_path, stack, unreadable)
    status = agent.read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["code"], status["reason"]) == ("failed", 3, "no row can be read")


def nothing() -> Prepared:
    return Prepared({}, {}, cast(Any, None), {})


def test_what_a_start_killed_on_another_host_left_is_removed(tmp_path: Path) -> None:
    """Half an export is as large as a model; that of a checkpoint is another command's, which may be at work."""
    other = tmp_path / ".export-step-00000002.@else@1@abcdef01.tmp"
    for folder in (tmp_path / ".export.@else@1@abcdef01.tmp", other):
        folder.mkdir()
        (folder / "part-0").touch()
    (tmp_path / ".status.json.abcdef01.tmp").touch()
    with ExitStack() as stack:
        open_run(compose("full", ["model.path=x", "data.train=y"]), tmp_path, stack, nothing)
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == [other]


def test_the_run_keeps_the_manifest_of_its_data(tmp_path: Path) -> None:
    prepared = Prepared({}, {}, cast(Any, None), {}, manifest={"format": 1, "sources": {}})
    with ExitStack() as stack:
        open_run(compose("full", ["model.path=x", "data.train=y"]), tmp_path, stack, lambda: prepared)
    assert read_manifest(tmp_path / "data-manifest.json") == prepared.manifest


def start_on_its_own_host(world: World, folder: str) -> str | None:
    os.environ[START_VARIABLE] = f"agent of host {world.rank}"
    cfg = compose("full", ["model.path=x", "data.train=y"])
    with ExitStack() as stack:
        open_run(cfg, Path(folder), stack, nothing)
    return this_start()


def test_all_hosts_call_the_start_what_rank_0_calls_it(tmp_path: Path) -> None:
    """Any rank may write the failure that rank 0 of a restarted group has to recognise as this start's."""
    assert run_ranks(start_on_its_own_host, 2, str(tmp_path)) == ["agent of host 0"] * 2


def test_a_directory_that_rank_0_does_not_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"not the directory that rank 0 writes to.*all nodes share"):
        require_shared(tmp_path, "this start", seconds=0.3)
    monkeypatch.setenv(START_VARIABLE, "an earlier start")
    agent.write_status(tmp_path, "preempted", 75)
    with pytest.raises(StartupError):
        require_shared(tmp_path, "this start", seconds=0.3)
    monkeypatch.setenv(START_VARIABLE, "this start")
    agent.write_status(tmp_path, "running", 75)
    require_shared(tmp_path, "this start", seconds=0.0)
