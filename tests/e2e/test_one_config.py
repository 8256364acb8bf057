"""A10: all ranks of a run train one configuration in one directory, and Hydra writes nothing anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sftdist.core.snapshot import config_hash, from_dict
from tests.conftest import ROOT
from tests.e2e.jobs import KEYS
from tests.e2e.workshop import environment, metrics, status
from tests.faults import train_to_the_end
from tests.recorded import NOTES, Recorded

pytestmark = pytest.mark.timeout(600)
RANKS = 4
MOMENTS = ("run.note=${now:%f}", "tracking.group=g-${now:%f}", "train.startup_checks=true")
OF_HYDRA = (".hydra", "outputs", "multirun", "multirun.yaml", "hydra.yaml", "train.log", "overrides.yaml")


def start(home: Path, notes: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A bare torchrun, as another tool may start it."""
    notes.mkdir()
    ranks = ["--standalone", "--nproc-per-node", str(RANKS), "-m", "tests.recorded"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *ranks, *KEYS, "train.max_steps=2", *words],
        cwd=home,
        env={**environment(), "PYTHONPATH": str(ROOT), NOTES: str(notes)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def runs_in(home: Path) -> list[Path]:
    return [path for path in (home / "runs").iterdir() if path.is_dir()]


def one_run(home: Path, notes: Path) -> Path:
    """The only run directory, after all that can differ between ranks was compared."""
    (run_dir,) = runs_in(home)
    assert re.fullmatch(r"full-[0-9a-f]{8}", run_dir.name)
    said = {path.name: path.read_text() for path in notes.iterdir()}
    assert sorted(said) == [str(rank) for rank in range(RANKS)]
    assert set(said.values()) == {(run_dir / "config.yaml").read_text()}
    cfg = from_dict(yaml.safe_load(said["0"]))
    assert cfg.run.note.isdecimal()
    assert cfg.tracking.group == f"g-{cfg.run.note}", "one moment in one configuration"
    assert run_dir.name == f"full-{config_hash(cfg)[:8]}"
    assert [step for (step,) in metrics(run_dir, "step")] == [1, 2]
    assert status(run_dir)["state"] == "done"
    assert [path for path in home.rglob("*") if path.name in OF_HYDRA] == []
    return run_dir


def test_the_moment_of_a_start_is_the_same_on_every_rank(home: Path, tmp_path: Path) -> None:
    """Each rank by itself would give another microsecond."""
    train_to_the_end(RANKS, [*KEYS, "train.max_steps=2", *MOMENTS], home, Recorded(tmp_path))
    one_run(home, tmp_path)


@pytest.mark.long
def test_a_bare_torchrun_trains_one_configuration_and_finds_its_run_again(home: Path, tmp_path: Path) -> None:
    shutil.rmtree(home / "runs", ignore_errors=True)
    done = start(home, tmp_path / "first", *MOMENTS)
    assert done.returncode == 0, done.stderr
    run_dir = one_run(home, tmp_path / "first")
    again = start(home, tmp_path / "second", *MOMENTS)
    assert again.returncode == 0, again.stderr
    assert f"{Path('runs') / run_dir.name} is finished (step 2)" in again.stdout
    assert runs_in(home) == [run_dir]


@pytest.mark.long
def test_a_name_with_the_moment_in_it_starts_nothing(home: Path, tmp_path: Path) -> None:
    done = start(home, tmp_path / "refused", "run.name=x-${now:%f}")
    assert done.returncode == 1
    assert done.stderr.count("sftdist train: error: run.name: given x-${now:%f}, which is another value at") == 1
    assert list((tmp_path / "refused").iterdir()) == []
