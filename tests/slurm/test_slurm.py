"""`sftdist train` as jobs of a real SLURM, on two nodes: to the end, stopped and requeued, cancelled, refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.snapshot import read_config
from tests.conftest import ROOT
from tests.e2e.workshop import sftdist, status
from tests.slurm.cluster import OVER, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]  # several starts of torchrun each, on a busy machine
QUICKSTART = (
    *("train.max_steps=20", "launch.nproc=1", "tracking.wandb=disabled"),
    *("eval.every_steps=0", "checkpoint.every_steps=0", "train.startup_checks=false", "data.workers=1"),
)
# What no two runs have in common: the clock, and how much memory the process happens to hold.
OWN = ("step_seconds", "tokens_per_second", "mfu", "data_wait_seconds", "memory_gib")


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Every training line, but for the clock and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OWN} for line in lines if line["kind"] == "train"]


def submit(cluster: Cluster, *words: str, nodes: int, exp: str = "quickstart") -> tuple[str, Path]:
    """A training job; its number and its run directory."""
    job = cluster.submit("train.sbatch", f"+exp={exp}", *QUICKSTART, *words, options=[f"--nodes={nodes}"])
    return job, cluster.home / f"runs/{exp}-{job}"


def until_step(cluster: Cluster, job: str, run_dir: Path, step: int) -> None:
    """Wait for the figures of an optimizer step of a job that runs, or waits for its nodes."""
    file = run_dir / "metrics.jsonl"

    def there() -> bool:
        assert cluster.state(job) not in OVER, cluster.log(job)
        return file.is_file() and f'"step": {step},' in file.read_text()

    cluster.until(there, 240, lambda: cluster.log(job))


def succeed(cluster: Cluster, job: str) -> None:
    assert cluster.end(job, 300) == ("COMPLETED", 0), cluster.log(job)


@pytest.fixture(scope="session")
def whole(cluster: Cluster) -> Path:
    """The run directory of a job on two nodes that nobody touched."""
    job, run_dir = submit(cluster, nodes=2)
    succeed(cluster, job)
    return run_dir


def test_two_nodes_train_to_the_end(whole: Path) -> None:
    assert [line["step"] for line in curve(whole)] == list(range(1, 21))
    assert (status(whole)["state"], status(whole)["code"]) == ("done", 0)
    assert (whole / "export/model.safetensors").is_file()
    assert sorted(path.name for path in (whole / "log").glob("rank-*")) == ["rank-00000.log", "rank-00001.log"]


def test_stopped_before_the_time_limit_and_requeued_it_ends_the_same(cluster: Cluster, whole: Path) -> None:
    job, run_dir = submit(cluster, nodes=2)
    until_step(cluster, job, run_dir, 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends
    cluster.start_now(job)
    stopped = status(run_dir)
    assert (stopped["state"], stopped["code"]) == ("preempted", 75)
    assert 3 <= stopped["step"] < 20
    succeed(cluster, job)
    assert curve(run_dir) == curve(whole)
    assert cluster.job(job)["Restarts"] == "1"
    assert "start 2" in cluster.log(job)


def test_scancel_leaves_a_complete_checkpoint_and_a_bad_key_a_failed_job(cluster: Cluster) -> None:
    note = 'it\'s "50%", = {a, b}'
    quoted = 'run.note="' + note.replace('"', '\\"') + '"'
    job, run_dir = submit(cluster, quoted, "train.max_steps=200", nodes=1)
    failing, _ = submit(cluster, "optimizer.learning_rate=1", nodes=1)
    until_step(cluster, job, run_dir, 3)
    cluster.run("scancel", job)
    assert cluster.end(job)[0] == "CANCELLED"
    assert status(run_dir)["state"] == "preempted"
    shown = sftdist(["runs", "checkpoints", str(run_dir)], cluster.home)
    assert shown.returncode == 0, shown.stdout
    step = status(run_dir)["step"]
    assert f"{step} " in shown.stdout
    assert "verifies" in shown.stdout
    assert read_config(run_dir).run.note == note
    assert cluster.end(failing) == ("FAILED", 2)
    assert "optimizer.learning_rate: unknown key; did you mean optimizer.lr?" in cluster.log(failing)
    assert [cluster.job(each)["Restarts"] for each in (job, failing)] == ["0", "0"]


@pytest.mark.long
def test_requeued_by_a_person_and_with_an_edited_preset(cluster: Cluster, whole: Path) -> None:
    """SLURM requeues, and the run goes on; with the preset edited meanwhile it is refused, and nothing trained anew."""
    text = (ROOT / "conf/exp/quickstart.yaml").read_text()
    preset = cluster.home / "conf/exp/mine.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(text)
    job, run_dir = submit(cluster, nodes=2, exp="mine")
    until_step(cluster, job, run_dir, 3)
    preset.write_text(text.replace("precision: bf16", "precision: fp32"))
    cluster.run("scontrol", "requeue", job)
    cluster.start_now(job)
    assert cluster.end(job) == ("FAILED", 2), cluster.log(job)
    assert "precision: " in cluster.log(job)
    assert status(run_dir)["state"] == "preempted"
    preset.write_text(text)
    cluster.run("scontrol", "requeue", job)
    cluster.start_now(job)
    succeed(cluster, job)
    assert curve(run_dir) == curve(whole)


@pytest.mark.long
def test_a_sweep_of_three_mixtures_is_one_array(cluster: Cluster) -> None:
    mixtures = "{domain:0.8,general:0.1,format:0.1},{domain:0.5,general:0.3,format:0.2},balanced"
    words = [
        "train",
        "-m",
        "hydra/launcher=slurm",
        "+exp=quickstart",
        *QUICKSTART,
        "train.max_steps=4",
        f"+data.mix={mixtures}",
    ]
    done = cluster.run(sys.executable, "-m", "sftdist.cli", *words)
    runs = [path for path in (cluster.home / "runs").glob("quickstart-*") if (path / "config.yaml").is_file()]
    swept = [path for path in runs if len(curve(path)) == 4]
    assert len(swept) == 3, done
    assert all(status(path)["state"] == "done" for path in swept)
    again = cluster.run(sys.executable, "-m", "sftdist.cli", *words)
    assert "finished before" in again


@pytest.mark.long
def test_a_pipeline_has_one_run_for_all_stages(cluster: Cluster, whole: Path) -> None:
    job = cluster.submit(
        "pipeline.sbatch", "+exp=quickstart", "name=desk", *QUICKSTART, SFTDIST_TRAIN_OPTIONS="--nodes=2"
    )
    succeed(cluster, job)
    prepare, train = [line.split("job ")[1] for line in cluster.log(job).splitlines() if ": job " in line][:2]
    for stage in (prepare, train):
        succeed(cluster, stage)
    assert curve(cluster.home / f"runs/quickstart-{job}") == curve(whole)
    typo = cluster.submit("pipeline.sbatch", "+exp=quickstart", "name=desk", "optimizer.learning_rate=1")
    assert cluster.end(typo) == ("FAILED", 2)
    assert "did you mean optimizer.lr?" in cluster.log(typo)
    assert ": job " not in cluster.log(typo), "nothing is submitted"
