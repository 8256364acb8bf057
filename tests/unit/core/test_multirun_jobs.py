"""The jobs of a sweep as processes: several at once, failing, stopped, started again; what the sweep says of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftdist.core import snapshot
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.processes import usable_cores
from sftdist.core.settings import TrainConfig
from sftdist.core.sweep import FILE, Job, Sweep, SweepStopped
from sftdist.core.sweep_processes import run_jobs
from sftdist.core.sweep_share import deal, devices_here, threads
from sftdist.core.words import word
from sftdist.training.opening import refuse_other_config
from tests.conftest import ROOT

PROGRAM = (sys.executable, str(ROOT / "tests" / "swept.py"))


@pytest.fixture(scope="module")
def cfg() -> TrainConfig:
    return compose("lora", ["model.path=m", "data.train=x.jsonl"])


def sweep_of(folder: Path, cfg: TrainConfig, *doing: str) -> tuple[Sweep, list[Job]]:
    """One job per word, told to do that."""

    def make(number: int, overrides: tuple[str, ...]) -> Job:
        run_dir = folder / f"run-{number}"
        return Job(number, overrides, (*overrides, word("run.dir", str(run_dir))), run_dir, cfg)

    sweep = Sweep("train", folder / "sweep-1", make, ["+exp"], PROGRAM)
    jobs = [sweep.job(at, ("+exp=lora", f"seed={at}", f"run.note={word_}")) for at, word_ in enumerate(doing)]
    sweep.recall()
    sweep.begin(jobs)
    return sweep, jobs


def started(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.run_dir / "started.json").read_text())  # type: ignore[operator]
    return found


def states(sweep: Sweep) -> list[tuple[str, int | None]]:
    return [(sweep.outcomes[number].state, sweep.outcomes[number].code) for number in sorted(sweep.outcomes)]


def when(there: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Do something as soon as something has become true."""

    def watch() -> None:
        deadline = time.monotonic() + 30
        while not there() and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# One after another


def test_a_failed_job_does_not_stop_the_rest(
    tmp_path: Path, cfg: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep, jobs = sweep_of(tmp_path, cfg, "fine", "fail", "mute", "killed", "fine")
    run_jobs(sweep, jobs, 1)
    assert states(sweep) == [("done", 0), ("failed", 1), ("failed", 3), ("failed", 137), ("done", 0)]
    assert [sweep.outcomes[number].metric for number in range(5)] == [0.0, None, None, None, 4.0]
    assert sweep.code() == 1
    times = [started(job)["began"] for job in jobs]
    assert times == sorted(times)
    assert started(jobs[4])["began"] >= started(jobs[0])["ended"]
    assert "doing mute" in capfd.readouterr().out, "one after another they have this screen"
    assert not (sweep.folder / "screens").exists()
    table = "\n".join(sweep.table())
    assert "eval/loss" in table.splitlines()[0]
    assert "1    seed=1 run.note=fail    failed  1     2                " in table
    assert "+exp=lora" not in table.partition("job 1 failed")[0], "what is the same in all jobs is not shown"
    assert (
        "job 1 failed with exit code 1: sftdist train +exp=lora seed=1 run.note=fail\n  the loss is nan in step 2"
        in table
    )
    assert (
        "job 2 failed with exit code 3: sftdist train +exp=lora seed=2 run.note=mute\n  its message is above" in table
    )
    assert "job 3 failed" in table
    assert "ended without a word (training)" in table


def test_a_job_trains_what_was_checked(tmp_path: Path, cfg: TrainConfig) -> None:
    """A preset may be edited before a job starts: on a cluster that may be days later."""
    _, (job,) = sweep_of(tmp_path, cfg, "fine")
    edited = compose("lora", ["model.path=m", "data.train=x.jsonl", "seed=7"])
    assert job.run_dir is not None
    with pytest.raises(ConfigError, match="seed: was 0, now 7"):
        refuse_other_config(edited, job.run_dir)
    refuse_other_config(cfg, job.run_dir)


def test_an_unreadable_run_is_one_jobs_fault(tmp_path: Path, cfg: TrainConfig) -> None:
    (tmp_path / "run-0").mkdir()
    (tmp_path / "run-0" / snapshot.FILE).write_text("config_version: 99")
    (tmp_path / "run-0" / "status.json").write_text(
        '{"state": "done", "code": 0, "step": 2, "start": "s", "reason": ""}'
    )
    sweep, jobs = sweep_of(tmp_path, cfg, "fail", "fine")
    run_jobs(sweep, jobs, 1)
    assert states(sweep) == [("failed", 1), ("done", 0)]


def test_the_folder_tells_it_all(tmp_path: Path, cfg: TrainConfig) -> None:
    sweep, jobs = sweep_of(tmp_path, cfg, "fine", "fail")
    run_jobs(sweep, jobs, 1)
    entries = json.loads((sweep.folder / FILE).read_text())["jobs"]
    assert [entry["number"] for entry in entries] == [0, 1]
    assert entries[1]["overrides"] == ["+exp=lora", "seed=1", "run.note=fail"]
    assert entries[1]["run_dir"] == str(tmp_path / "run-1")
    assert [(entry["state"], entry["code"], entry["step"], entry["metric"]) for entry in entries] == [
        ("done", 0, 2, 0.0),
        ("failed", 1, 2, None),
    ]
    words = (sweep.folder / "jobs" / "00001").read_text().split("\0")
    assert words == ["+exp=lora", "seed=1", "run.note=fail", f"run.dir='{tmp_path / 'run-1'}'", ""]
    assert list(jobs[1].words) == words[:-1] == started(jobs[1])["words"]


def test_a_status_of_an_earlier_start_is_not_taken_for_this_one(tmp_path: Path, cfg: TrainConfig) -> None:
    sweep, jobs = sweep_of(tmp_path, cfg, "fail")
    run_jobs(sweep, jobs, 1)
    sweep, jobs = sweep_of(tmp_path, cfg, "mute")
    run_jobs(sweep, jobs, 1)
    assert states(sweep) == [("failed", 3)]
    assert "nan" not in sweep.outcomes[0].reason


def test_finished_jobs_are_skipped_and_others_go_on(tmp_path: Path, cfg: TrainConfig) -> None:
    sweep, jobs = sweep_of(tmp_path, cfg, "fine", "fail", "fine")
    run_jobs(sweep, jobs, 1)
    first = [started(job)["began"] for job in jobs]
    snapshot.write_config(tmp_path / "run-0", cfg)
    snapshot.write_config(tmp_path / "run-2", compose("lora", ["model.path=other", "data.train=x.jsonl"]))
    sweep, jobs = sweep_of(tmp_path, cfg, "fine", "fail", "fine")
    run_jobs(sweep, jobs, 1)
    again = [started(job)["began"] for job in jobs]
    assert again[0] == first[0]
    assert again[1] > first[1]
    assert again[2] > first[2], "it is finished, but it is another run: its own command refuses it"
    assert sweep.outcomes[0].metric == 0.0
    assert sweep.outcomes[0].state == "done"


@pytest.mark.parametrize(
    ("metric", "state", "value"), [("loss", "done", 1.5), ("eval/loss", "done", 0.0), ("eval/acc", "failed", None)]
)
def test_the_metric_that_is_asked_for(metric: str, state: str, value: float | None, tmp_path: Path) -> None:
    cfg = compose("lora", ["model.path=m", "data.train=x.jsonl", f"sweep.metric={metric}"])
    sweep, jobs = sweep_of(tmp_path, cfg, "fine")
    run_jobs(sweep, jobs, 1)
    assert (sweep.outcomes[0].state, sweep.outcomes[0].metric) == (state, value)
    if value is None:
        assert sweep.code() == 1
        assert "eval/acc" in sweep.outcomes[0].reason
        assert "its numbers are eval/loss, loss, step" in sweep.outcomes[0].reason


# Several at once


def test_two_at_once_share_the_cores(tmp_path: Path, cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep, jobs = sweep_of(tmp_path, cfg, "slow", "mute", "slow", "slow")
    run_jobs(sweep, jobs, 2)
    assert states(sweep) == [("done", 0), ("failed", 3), ("done", 0), ("done", 0)]
    assert started(jobs[2])["began"] < started(jobs[0])["ended"]
    assert started(jobs[3])["began"] >= min(started(jobs[0])["ended"], started(jobs[2])["ended"])
    assert (sweep.folder / "screens" / "00000.log").read_text() == "doing slow\n"
    assert sweep.outcomes[1].log == str(sweep.folder / "screens" / "00001.log")
    assert "data.train: there is no such file" in sweep.outcomes[1].reason
    assert started(jobs[0])["threads"] == str(max(1, usable_cores() // 2))


def test_what_the_user_has_set_stays(tmp_path: Path, cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    sweep, jobs = sweep_of(tmp_path, cfg, "fine", "fine")
    run_jobs(sweep, jobs, 2)
    assert [started(job)["threads"] for job in jobs] == ["3", "3"]


@pytest.mark.parametrize(
    ("devices", "parallel", "parts"),
    [
        ("0 1 2 3", 2, ["0,1", "2,3"]),
        ("0 1 2", 2, ["0", "1"]),  # equal parts: what is over stays idle
        ("GPU-a GPU-b", 2, ["GPU-a", "GPU-b"]),
        ("4 5 6 7", 4, ["4", "5", "6", "7"]),
    ],
)
def test_devices_are_dealt_out(devices: str, parallel: int, parts: list[str]) -> None:
    found = deal(devices.split(), parallel, [None, 1])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in found] == parts
    dealt = ",".join(parts).split(",")
    assert len(set(dealt)) == len(dealt)


def test_one_job_at_a_time_has_them_all_and_without_any_there_is_nothing_to_deal() -> None:
    assert deal(["0", "1"], 1, [2]) == [{}]
    assert deal([], 3, [None]) == [{}, {}, {}]


@pytest.mark.parametrize(
    ("devices", "parallel", "ranks", "said"),
    [(2, 3, [None], "set parallel=2"), (8, 4, [None, 4], "set parallel=2, or lower launch.nproc")],
)
def test_too_few_devices_are_refused(devices: int, parallel: int, ranks: list[int | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        deal([str(at) for at in range(devices)], parallel, ranks)


def test_hidden_devices_are_not_dealt_out() -> None:
    assert devices_here({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_threads_are_never_none() -> None:
    assert [threads(8, 2, 2), threads(2, 2, 4), threads(1, 3, 1)] == [2, 1, 1]


# Signals


@pytest.mark.parametrize("doing", ["wait", "deaf"])
def test_a_stop_ends_what_runs_and_starts_no_more(doing: str, tmp_path: Path, cfg: TrainConfig) -> None:
    sweep, jobs = sweep_of(tmp_path, cfg, "fine", doing, doing, "fine")
    there = [tmp_path / f"run-{number}" / "started.json" for number in (1, 2)]

    def act() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    when(lambda: all(path.is_file() for path in there), act)
    began = time.monotonic()
    with pytest.raises(SweepStopped):
        run_jobs(sweep, jobs, 2)
    assert time.monotonic() - began < 30
    assert states(sweep) == [("done", 0), ("preempted", 75), ("preempted", 75), ("waiting", None)]
    assert not (tmp_path / "run-3" / "started.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as it was before"


def test_jobs_know_whom_they_die_with(tmp_path: Path, cfg: TrainConfig) -> None:
    """What `sftdist` needs so that the kernel ends it with a sweep that is killed."""
    sweep, jobs = sweep_of(tmp_path, cfg, "fine")
    run_jobs(sweep, jobs, 1)
    assert started(jobs[0])["parent"] == str(os.getpid())
