"""A sweep as a SLURM job array: what is submitted, and what is read of the queue. (tests/slurm runs a real one.)"""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from sftdist.core.config import compose
from sftdist.core.errors import ConfigError, StartupError
from sftdist.core.shipped import shipped_folder
from sftdist.core.sweep import Job, Sweep, SweepStopped
from sftdist.core.sweep_array import (
    ArraySettings,
    ended_task,
    outside_of_a_job,
    parse_queue,
    ranges,
    run_array,
    sbatch_line,
)

QUICK = ArraySettings(poll_seconds=0.05)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([3, 1, 0, 7], "0-1,3,7"), ([5, 6, 8, 9, 10], "5-6,8-10"), ([0, 1], "0-1")],
)
def test_numbers_as_sbatch_takes_them(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_the_line_for_sbatch(tmp_path: Path) -> None:
    settings = ArraySettings(("--partition=gpu", "--output=mine-%a"), parallel=4)
    folder = tmp_path / "my runs" / "sweep-1"
    line = sbatch_line(folder, [0, 1, 2, 5], settings)
    assert line[:2] == ["sbatch", "--parsable"]
    assert line[2:5] == ["--array=0-2,5%4", "--job-name=sweep-1", f"--output={folder}/screens/%5a.log"]
    assert line[5:7] == ["--partition=gpu", "--output=mine-%a"], "the last one wins with sbatch"
    assert line[7:] == [str(shipped_folder("slurm") / "sweep.sbatch"), str(folder)]
    assert Path(line[7]).is_file()
    assert sbatch_line(Path("runs/sweep-1"), [0], ArraySettings())[-1] == str(Path.cwd() / "runs/sweep-1")


def test_the_queue() -> None:
    assert parse_queue("12_0 RUNNING\n12_3 PENDING\n13 COMPLETING\n\n") == {
        "12_0": "RUNNING",
        "12_3": "PENDING",
        "13": "COMPLETING",
    }


# Against commands that answer as SLURM's do: a sequence of queues, one per look


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files `1`, `2`, ... are what squeue says at each look; the last one stays. `submitted` holds the
    words of sbatch."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    commands = {
        "sbatch": 'printf "%s\\n" "$@" >>"$here/submitted"; [ ! -f "$here/refusal" ] || { cat "$here/refusal" >&2; '
        "exit 1; }\necho 4711",
        "squeue": 'look=$(($(cat "$here/look" 2>/dev/null || echo 0) + 1))\necho $look >"$here/look"\n'
        'while [ ! -f "$here/$look" ]; do look=$((look - 1)); done\n'
        'if [ "$(cat "$here/$look")" = down ]; then echo "no controller" >&2; exit 1; fi\ncat "$here/$look"',
    }
    for name, body in commands.items():
        file = folder / name
        file.write_text(f"#!/usr/bin/env bash\nhere={folder}\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    (folder / "0").write_text("")
    return folder


def sweep_of(tmp_path: Path, *seeds: int) -> tuple[Sweep, list[Job]]:
    cfg = compose("lora", ["model.path=m", "data.train=x.jsonl"])

    def make(number: int, overrides: tuple[str, ...]) -> Job:
        return Job(number, overrides, overrides, tmp_path / f"run-{number}", cfg)

    sweep = Sweep("train", tmp_path / "sweep-1", make)
    jobs = [sweep.job(number, (f"seed={seed}",)) for number, seed in enumerate(seeds)]
    sweep.recall()
    sweep.begin(jobs)
    return sweep, jobs


def leave(job: Job, state: str, code: int, start: str = "s1", reason: str = "") -> None:
    """What a task has left in its run."""
    assert job.run_dir is not None
    job.run_dir.mkdir(exist_ok=True)
    status = {"state": state, "code": code, "reason": reason, "step": 3, "start": start}
    (job.run_dir / "status.json").write_text(json.dumps(status))


def states(sweep: Sweep) -> list[tuple[str, int | None]]:
    return [(sweep.outcomes[number].state, sweep.outcomes[number].code) for number in sorted(sweep.outcomes)]


def after(slurm: Path, look: int, act: object) -> None:
    """Do something once the queue has been looked at so often."""

    def watch() -> None:
        while int((slurm / "look").read_text() or 0 if (slurm / "look").is_file() else 0) < look:
            time.sleep(0.01)
        act()  # type: ignore[operator]

    threading.Thread(target=watch, daemon=True).start()


def test_an_array_is_waited_for(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, jobs = sweep_of(tmp_path, 1, 2, 3, 4)
    (slurm / "1").write_text("9_0 RUNNING\n")  # another job of this user
    (slurm / "2").write_text("4711_0 RUNNING\n4711_1 PENDING\n4711_2 PENDING\n4711_3 PENDING\n")
    (slurm / "3").write_text("down")
    (slurm / "4").write_text("4711_1 RUNNING\n4711_2 REQUEUED\n")
    (slurm / "5").write_text("4711_2 RUNNING\n4711_1 COMPLETING\n")
    (slurm / "6").write_text("")
    leave(jobs[0], "done", 0)
    leave(jobs[1], "failed", 1, reason="the loss is nan")
    leave(jobs[2], "preempted", 75)
    for job in jobs[:3]:  # by this array, not by an earlier start
        (job.run_dir / "status.json").rename(job.run_dir / "later")  # type: ignore[operator]

    def end() -> None:
        for job in jobs[:3]:
            (job.run_dir / "later").rename(job.run_dir / "status.json")  # type: ignore[operator]
        sweep.screen(jobs[3]).write_text("slurmstepd: error: Exceeded job memory limit\n")

    after(slurm, 3, end)
    run_array(sweep, jobs, QUICK)
    assert states(sweep) == [("done", 0), ("failed", 1), ("preempted", 75), ("failed", 1)]
    assert sweep.outcomes[3].reason == "slurmstepd: error: Exceeded job memory limit"
    out = capsys.readouterr().out
    assert "submitted job array 4711 with jobs 0-3" in out
    assert "squeue: no controller" in out
    assert out.count("job 1: running") == 1
    submitted = (slurm / "submitted").read_text().splitlines()
    assert "--array=0-3" in submitted


def test_a_look_that_misses_a_task_is_no_end(slurm: Path, tmp_path: Path) -> None:
    """A task that is being requeued may be in no queue for a moment."""
    sweep, jobs = sweep_of(tmp_path, 1)
    for look, text in enumerate(["", "4711_0 RUNNING\n", "", "4711_0 PENDING\n", ""], 1):
        (slurm / str(look)).write_text(text)
    after(slurm, 4, lambda: leave(jobs[0], "done", 0))
    run_array(sweep, jobs, QUICK)
    assert states(sweep) == [("done", 0)]


def test_the_same_line_again_waits_for_the_same_array(slurm: Path, tmp_path: Path) -> None:
    sweep, jobs = sweep_of(tmp_path, 1, 2)
    run_array(sweep, jobs, ArraySettings(wait=False))
    assert states(sweep) == [("queued", None), ("queued", None)]
    assert sweep.code() == 0
    before = (slurm / "submitted").read_text()
    (slurm / "2").write_text("4711_0 RUNNING\n4711_1 PENDING\n")
    (slurm / "4").write_text("")
    leave(jobs[0], "running", 1)

    def end() -> None:
        leave(jobs[0], "done", 0)
        leave(jobs[1], "done", 0)

    after(slurm, 3, end)
    sweep, jobs = sweep_of(tmp_path, 1, 2)
    run_array(sweep, jobs, QUICK)
    assert (slurm / "submitted").read_text() == before
    assert states(sweep) == [("done", 0), ("done", 0)]


def test_what_is_no_longer_queued_is_submitted_again(slurm: Path, tmp_path: Path) -> None:
    sweep, jobs = sweep_of(tmp_path, 1, 2, 3)
    run_array(sweep, jobs, ArraySettings(wait=False))
    (slurm / "2").write_text("4711_1 RUNNING\n")
    sweep, jobs = sweep_of(tmp_path, 1, 2, 3)
    run_array(sweep, jobs, ArraySettings(wait=False))
    assert "--array=0,2" in (slurm / "submitted").read_text().splitlines()


def test_other_jobs_in_the_queue_under_these_numbers_are_not_run_over(slurm: Path, tmp_path: Path) -> None:
    sweep, jobs = sweep_of(tmp_path, 1)
    run_array(sweep, jobs, ArraySettings(wait=False))
    (slurm / "2").write_text("4711_0 RUNNING\n")
    sweep, jobs = sweep_of(tmp_path, 2)
    with pytest.raises(ConfigError, match="scancel 4711"):
        run_array(sweep, jobs, QUICK)


def test_a_stop_ends_the_waiting_alone(slurm: Path, tmp_path: Path) -> None:
    sweep, jobs = sweep_of(tmp_path, 1)
    (slurm / "2").write_text("4711_0 RUNNING\n")
    after(slurm, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SweepStopped, match="job array 4711 goes on"):
        run_array(sweep, jobs, QUICK)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_refusals(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, jobs = sweep_of(tmp_path, 1)
    with pytest.raises(ConfigError, match="required at least 1"):
        run_array(sweep, jobs, ArraySettings(parallel=0))
    (slurm / "refusal").write_text("sbatch: error: invalid partition specified: gpux")
    with pytest.raises(StartupError, match="invalid partition specified: gpux"):
        run_array(sweep, jobs, QUICK)
    several = compose("lora", ["model.path=m", "data.train=x.jsonl", "launch.nodes=2", "launch.address=a:1"])
    with pytest.raises(ConfigError, match=r"--nodes=2"):
        run_array(sweep, [Job(0, (), (), tmp_path, several)], QUICK)
    (slurm / "1").write_text("down")
    (slurm / "look").unlink()
    with pytest.raises(StartupError, match="squeue does not answer"):
        run_array(sweep, jobs, QUICK)
    sweep.command = "prepare"
    with pytest.raises(ConfigError, match="given sftdist prepare, required train"):
        run_array(sweep, jobs, QUICK)
    monkeypatch.setenv("PATH", "")
    sweep.command = "train"
    with pytest.raises(ConfigError, match="squeue is not on the PATH"):
        run_array(sweep, jobs, QUICK)


def test_a_status_from_before_the_array_is_not_the_tasks(tmp_path: Path) -> None:
    _, jobs = sweep_of(tmp_path, 1)
    leave(jobs[0], "failed", 1, start="s1", reason="long ago")
    assert ended_task(jobs[0], "s1", tmp_path / "none").reason.startswith("the task ended, or was cancelled")
    leave(jobs[0], "running", 1, start="s2", reason="training")
    assert ended_task(jobs[0], "s1", tmp_path / "none").reason == "it ended without a word (training)"


def test_an_array_is_submitted_as_from_outside_of_any_job() -> None:
    here = {"SLURM_JOB_ID": "7", "SLURM_GPUS_PER_NODE": "1", "SLURM_CONF": "/etc/s.conf", "SBATCH_PARTITION": "a"}
    assert outside_of_a_job(here) == {"SLURM_CONF": "/etc/s.conf", "SBATCH_PARTITION": "a"}
