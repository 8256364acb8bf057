"""Sweeps of real jobs: each with its own ranks, run directory and port."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.e2e.jobs import Running, torchrun
from tests.e2e.workshop import SMALL, environment, metrics, sftdist, status

KEYS = (
    *("+exp=full", "model.path=model", "data.train=my.jsonl", *SMALL),
    *("precision=fp32", "launch.nproc=1", "train.max_steps=2", "train.startup_checks=false"),
)
SWEEP = (sys.executable, "-m", "sftdist.cli", "train", "-m")
# The line that the issue promises, as it is typed.
MIXES = ("{domain:0.8,general:0.1,format:0.1}", "{domain:0.5,general:0.3,format:0.2}")
PROMISED = (
    *("-m", "hydra/launcher=torchrun", "+exp=quickstart", f"+data.mix={','.join(MIXES)}"),
    "optimizer.lr=1e-4,3e-4",
)


def entries(folder: Path) -> list[dict[str, Any]]:
    """What the newest sweep says of its jobs."""
    file = max(folder.rglob("sweep.json"), key=lambda path: path.stat().st_mtime)
    found: list[dict[str, Any]] = json.loads(file.read_text())["jobs"]
    return found


def states(folder: Path) -> list[tuple[str, int | None]]:
    return [(entry["state"], entry["code"]) for entry in entries(folder)]


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_failing_job_quotes_and_a_taken_port(home: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job cannot find its data; the other one trains, with a note that every shell and parser would split."""
    monkeypatch.setenv("MASTER_PORT", str(taken_port))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    words = ["train", "-m", *KEYS, "data.train=none.jsonl,my.jsonl", "run.note='a b, \"c\"'", "sweep.metric=loss"]
    done = sftdist(words, home)
    assert done.returncode == 3, done.stdout + done.stderr
    failed, trained = entries(home)
    assert (failed["state"], failed["code"]) == ("failed", 3)
    assert (trained["state"], trained["code"], trained["step"]) == ("done", 0, 2)
    assert "none.jsonl" in done.stderr
    assert "job 0 failed with exit code 3: sftdist train " in done.stdout
    assert " data.train=none.jsonl " in done.stdout
    run_dir = home / trained["run_dir"]
    assert run_dir.name.startswith("full-")
    assert "4711" not in run_dir.name
    assert trained["metric"] == metrics(run_dir, "loss")[-1][0]
    config = (run_dir / "config.yaml").read_text()
    assert 'note: a b, "c"\n' in config
    assert f"group: {next(path.name for path in (home / 'runs').glob('sweep-*'))}\n" in config
    assert {path.name for path in home.iterdir()} <= {"model", "my.jsonl", "runs", "stores"}, "no file of Hydra's own"


def test_a_sweep_inside_torchrun_is_refused_once(home: Path) -> None:
    done = subprocess.run(
        [*torchrun(), "-m", "+exp=full", "seed=1,2", "run.note=a b"],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("sftdist train: error:")]
    assert len(said) == 1, done.stderr
    assert said[0].endswith("let each job start its own ranks: sftdist train -m +exp=full seed=1,2 'run.note=a b'")
    assert not list(home.glob("**/*seed*"))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_promised_line(tmp_path: Path) -> None:
    done = sftdist(["train", *PROMISED, "train.max_steps=2", "launch.nproc=1"], tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = entries(tmp_path)
    assert [(entry["state"], entry["step"]) for entry in found] == [("done", 2)] * 4
    assert len({entry["run_dir"] for entry in found}) == 4
    assert len({entry["metric"] for entry in found}) == 4
    for entry in found:
        assert (tmp_path / entry["run_dir"] / "export" / "model.safetensors").is_file()
    groups = {line.split()[-1] for line in _lines(tmp_path, "group:")}
    assert len(groups) == 1
    assert groups.pop().startswith("sweep-")


def _lines(folder: Path, word: str, files: str = "runs/*/config.yaml") -> list[str]:
    texts = [file.read_text() for file in folder.glob(files)]
    return [line for text in texts for line in text.splitlines() if word in line]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_stopped_and_started_again(home: Path) -> None:
    """A stop in the second of two jobs: it saves, goes on later, and what comes of it is what comes undisturbed."""
    longer = ("train.max_steps=40", "checkpoint.every_steps=10")
    words = [*SWEEP, *KEYS, *longer, "seed=11,12", "hydra.sweep.dir=stopped"]
    with Running(words, home) as job:
        job.until(lambda: len(runs_of(home / "stopped")) == 2)
        second = max(runs_of(home / "stopped"), key=lambda path: (path / "metrics.jsonl").stat().st_ctime)
        job.until_step(second, 3)
        job.tell(signal.SIGTERM)
        assert job.end() == 75, job.screen
        assert "the sweep was stopped" in job.screen
        assert not job.processes()
    assert states(home / "stopped") == [("done", 0), ("preempted", 75)]
    step = status(second)["step"]
    assert 3 <= step < 40
    with Running(words, home) as job:
        assert job.end() == 0, job.screen
        assert job.screen.count("finished before") == 1
        assert f"step {step + 1}/" in job.screen
        assert f"step {step}/" not in job.screen
    assert states(home / "stopped") == [("done", 0)] * 2
    undisturbed = sftdist(["train", *KEYS, *longer, "seed=12", "run.dir=alone"], home)
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    names = ("step", "loss", "lr", "rows")
    assert metrics(home / "alone", *names) == metrics(second, *names)


def runs_of(folder: Path) -> list[Path]:
    """The runs that have begun to train."""
    return [file.parent for file in folder.glob("*/metrics.jsonl")]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_at_once(tmp_path: Path) -> None:
    """From an empty folder: both lay the sample data out, and prepare it, at the same time."""
    words = ["+exp=quickstart", "seed=1,2,3", "train.max_steps=2", "launch.nproc=1", "parallel=2", "tracking=disabled"]
    with Running([*SWEEP, *words], tmp_path) as job:
        assert job.end(600) == 0, job.screen
        screen = job.screen
    assert states(tmp_path) == [("done", 0)] * 3
    screens = sorted(tmp_path.glob("runs/sweep-*/screens/*.log"))
    assert [path.name for path in screens] == ["00000.log", "00001.log", "00002.log"]
    assert all("done after step 2" in path.read_text() for path in screens)
    assert "step 1/2" not in screen


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_optuna_reads_the_metric(home: Path) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweep` (hydra-optuna-sweeper) is not there"
    )
    keys = [word for word in KEYS if not word.startswith("optimizer.lr=")]  # a fixed one would not be searched
    words = [*keys, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", "parallel=2"]
    words += ["optimizer.lr=interval(1e-5,1e-2)", "sweep.metric=loss", "hydra.sweep.dir=optuna", "run.note='a b,c'"]
    done = sftdist(["train", "-m", *words], home, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = entries(home / "optuna")
    assert [entry["state"] for entry in found] == ["done"] * 3
    (results,) = (home / "optuna").rglob("optimization_results.yaml")
    best = min(found, key=lambda entry: entry["metric"])
    rate = best["overrides"][0].partition("=")[2]
    assert f"best_params:\n  optimizer.lr: {rate}\nbest_value: {best['metric']}\n" in results.read_text()
    assert len({entry["run_dir"] for entry in found}) == 3
    notes = {line.strip() for line in _lines(home, "note:", "optuna/*/config.yaml")}
    assert notes == {"note: a b,c"}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_both_launchers_are_found_where_sftdist_is_installed(kind: str, tmp_path: Path) -> None:
    """In an environment of its own, which has the libraries of this one and nothing of the checkout on its path."""
    subprocess.run([sys.executable, "-m", "venv", "venv"], cwd=tmp_path, check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    where = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], **_READ)
    Path(where.stdout.strip(), "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    what = ["--editable", str(ROOT)] if kind == "editable" else [str(ROOT)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *what], cwd=tmp_path, check=True)
    program = str(tmp_path / "venv" / "bin" / "sftdist")
    words = [program, "prepare", "-m", "+exp=quickstart", "dry_run=true", "seed=1,2", "hydra/launcher=torchrun"]
    done = subprocess.run(words, cwd=tmp_path, env=_bare(), **_READ)
    assert [(entry["state"], entry["code"]) for entry in entries(tmp_path)] == [("done", 0)] * 2, done.stderr
    words = [program, "train", "-m", "+exp=quickstart", "hydra/launcher=slurm"]
    nowhere = subprocess.run(words, cwd=tmp_path, env={**_bare(), "PATH": ""}, **{**_READ, "check": False})
    assert "hydra/launcher=slurm: squeue is not on the PATH" in nowhere.stderr
    found = subprocess.run([python, "-c", _FIND], cwd=tmp_path, env=_bare(), **_READ).stdout.split()
    assert found == ["SlurmLauncher", "TorchrunLauncher", "True", str(kind == "editable")]


_READ: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
_FIND = f"""
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from sftdist.core.shipped import shipped_folder
print(*sorted(each.__name__ for each in Plugins.instance().discover(Launcher) if "sftdist" in each.__module__))
folder = shipped_folder("slurm")
print((folder / "sweep.sbatch").is_file(), folder.is_relative_to({str(ROOT)!r}))
"""


def _bare() -> dict[str, str]:
    return {key: value for key, value in environment().items() if key != "PYTHONPATH"}
