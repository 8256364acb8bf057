"""Ranks, agents and runs that die or meet each other: what comes back by itself, and what must not."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sftdist.core.config import compose
from sftdist.core.errors import StartupError
from sftdist.core.lock import RunLock
from sftdist.train import run
from sftdist.training import opening
from tests.conftest import ROOT
from tests.e2e.jobs import KEYS, TRAIN, Running, finish, same, torchrun
from tests.e2e.workshop import metrics, model_folder, status

pytestmark = pytest.mark.timeout(900)  # several starts of torchrun each, on a machine that may be busy
KILL = signal.SIGKILL


def test_a_killed_rank_brings_the_job_back_from_its_last_checkpoint(place: Path) -> None:
    run_dir = place / "runs/killed"
    with Running([*TRAIN, *KEYS, f"run.dir={run_dir}", "launch.max_restarts=1"], place) as job:
        job.until_step(run_dir, 15)
        job.tell(KILL, job.ranks()[1])
        assert job.end() == 0, job.screen
        assert job.screen.count("plan:") == 2
        assert "rank 1" in job.screen
    assert status(run_dir)["state"] == "done"
    assert same(place, "runs/killed", "runs/whole")


def test_a_killed_agent_leaves_no_ranks_and_a_second_run_names_the_first(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = place / "runs/alone"
    with Running([*torchrun(), *KEYS, f"run.dir={run_dir}"], place) as job:
        job.until_step(run_dir, 1)
        ranks = job.ranks()
        for pid in ranks.values():  # they would be done in seconds
            os.kill(pid, signal.SIGSTOP)
        monkeypatch.chdir(place)
        monkeypatch.setattr(opening, "RunLock", partial(RunLock, wait_seconds=0.5))
        with pytest.raises(StartupError, match=rf"in use by process {ranks[0]} on .*waited 0 s.*give another run.dir"):
            run(compose("full", [*KEYS[1:], f"run.dir={run_dir}"]))
        assert status(run_dir)["state"] == "running", "what the first one says of itself is left alone"
        assert job.agent() == job.process.pid
        job.tell(KILL)
        assert job.end(30) == -KILL
        deadline = time.monotonic() + 10
        while job.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert job.processes() == {}


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_torchruns_own_restarts(place: Path, rank: int) -> None:
    """Twice in a row, with a W&B run beside rank 0 that is killed with it or goes on without it."""
    run_dir = place / f"runs/torchrun-{rank}"
    with Running(
        [*torchrun("--max-restarts", "2"), *KEYS, f"run.dir={run_dir}", "tracking.wandb=offline"], place
    ) as job:
        for step in (15, 35):
            job.until_step(run_dir, step)
            job.tell(KILL, job.ranks()[rank])
            job.until(lambda step=step: len(metrics(run_dir, "step")) < step)  # type: ignore[misc]
        assert job.end() == 0, job.screen
        assert job.screen.count("plan:") == 3
    assert same(place, run_dir.relative_to(place).as_posix(), "runs/whole")


@pytest.mark.long
def test_a_group_that_dies_in_its_imports_comes_back_after_an_earlier_preemption(place: Path) -> None:
    """The status of the start before says `preempted`; that is no reason for this one's restart to give up."""
    run_dir = place / "runs/imports"
    with Running([*torchrun(), *KEYS, f"run.dir={run_dir}"], place) as job:
        job.until_step(run_dir, 3)
        job.tell(signal.SIGUSR1, job.ranks()[0])
        assert job.end() == 0, job.screen
    assert status(run_dir)["code"] == 75
    with Running([*torchrun("--max-restarts", "1"), *KEYS, f"run.dir={run_dir}"], place) as job:
        job.until(lambda: len(job.ranks()) == 2)
        job.tell(KILL, job.ranks()[1])
        assert job.end() == 0, job.screen
    assert same(place, "runs/imports", "runs/whole")


@pytest.mark.long
def test_a_preset_that_is_edited_meanwhile_does_not_begin_another_run(place: Path, tmp_path: Path) -> None:
    """The restarted ranks read it again; the directory is named by what it says."""
    for name in ("model", "my.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    preset = tmp_path / "conf/exp/mine.yaml"
    preset.parent.mkdir(parents=True)
    text = (ROOT / "conf/exp/full.yaml").read_text()
    preset.write_text(f"{text}  weight_decay: 0.1\n")
    with Running([*TRAIN, "+exp=mine", *KEYS[1:], "launch.max_restarts=1"], tmp_path) as job:
        job.until(lambda: any((tmp_path / "runs").glob("*/checkpoints/step-*/manifest.json")))
        preset.write_text(f"{text}  weight_decay: 0.2\n")
        job.tell(KILL, job.ranks()[1])
        assert job.end() == 2, job.screen
        assert "optimizer.weight_decay: was 0.1, now 0.2" in job.screen
    assert len(list((tmp_path / "runs").iterdir())) == 1


def poisoned(place: Path) -> Path:
    """The tiny model with a weight that is not a number."""
    folder = model_folder(place / "poisoned")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.long
@pytest.mark.parametrize("command", [[*TRAIN, "launch.max_restarts=2"], list(torchrun("--max-restarts", "2"))])
def test_a_non_finite_step_is_not_tried_again(place: Path, command: list[str]) -> None:
    run_dir = place / f"runs/nan-{len(command)}"
    keys = [*KEYS, f"model.path={poisoned(place)}", f"run.dir={run_dir}"]
    with Running([*command, *keys], place) as job:
        assert job.end() == 1, job.screen
        assert job.screen.count("plan:") == 1
        assert job.screen.count("error: not started again") == 2
    assert status(run_dir)["retry"] is False
    assert "must be finite" in status(run_dir)["reason"]
    assert not list(run_dir.glob("checkpoints/step-*"))


@pytest.mark.long
def test_the_last_lines_name_the_first_failure(place: Path) -> None:
    run_dir = place / "runs/last-lines"
    with Running([*TRAIN, *KEYS, f"run.dir={run_dir}", f"model.path={poisoned(place)}"], place) as job:
        assert job.end() == 1, job.screen
        last = job.screen[job.screen.rindex("sftdist: error:") :]
        assert re.search(r"rank \d on \S+ .*in step 1.*must be finite.*Rows of this step: train/row-", last, re.DOTALL)
        assert last.rstrip().endswith("log/failure.json")


@pytest.mark.long
def test_bad_data_is_not_tried_again(place: Path) -> None:
    (place / "bad.jsonl").write_text('{"messages": 5}\n')
    run_dir = place / "runs/bad"
    with Running([*torchrun("--max-restarts", "2"), *KEYS, "data.train=bad.jsonl", f"run.dir={run_dir}"], place) as job:
        assert job.end() == 1, job.screen
        assert job.screen.count("error: not started again") == 2
    assert status(run_dir)["code"] == 3


@pytest.mark.long
def test_a_bad_configuration_trains_nothing_however_often_torchrun_starts_it(place: Path) -> None:
    with Running(
        [*torchrun("--max-restarts", "1"), *KEYS, "optimizer.lr=-1", "run.dir=runs/unconfigured"], place
    ) as job:
        assert job.end() == 1, job.screen
        assert job.screen.count("error: optimizer.lr") == 2
    assert not (place / "runs/unconfigured").exists()


@pytest.mark.long
def test_a_second_command_waits_then_refuses(place: Path) -> None:
    run_dir = place / "runs/two"
    with Running([*TRAIN, *KEYS, f"run.dir={run_dir}"], place) as job:
        job.until_step(run_dir, 1)
        ranks = job.ranks()
        job.tell(signal.SIGSTOP, *ranks.values())
        with Running([*TRAIN, *KEYS, f"run.dir={run_dir}"], place) as second:
            assert second.end() == 1, second.screen
            assert f"in use by process {ranks[0]} on" in second.screen
            assert "waited 30 s" in second.screen
        job.tell(signal.SIGCONT, *ranks.values())
        assert job.end() == 0, job.screen
    assert same(place, "runs/two", "runs/whole")


@pytest.mark.long
def test_a_run_goes_on_when_everything_was_killed(place: Path) -> None:
    run_dir = place / "runs/all"
    with Running([*TRAIN, *KEYS, f"run.dir={run_dir}"], place) as job:
        job.until_step(run_dir, 15)
        job.tell(KILL, *job.processes())
        job.end(30)
    finish(place, f"run.dir={run_dir}")
    assert same(place, "runs/all", "runs/whole")
