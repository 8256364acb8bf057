"""`auto=true` from the command line: one choice for all ranks, in the run's configuration, and anew on a resume."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sftdist.core.snapshot import read_config
from tests.e2e.jobs import TRAIN, Running, torchrun
from tests.e2e.workshop import SMALL, metrics, sftdist

LINE = (
    *("+exp=full", "model.path=model", "data.train=my.jsonl", *SMALL),
    *("precision=fp32", "auto=true", "train.epochs=8", "checkpoint.every_steps=10"),
)
FEW = ("train.max_steps=2", "train.startup_checks=false", "checkpoint.every_steps=0")


def test_the_choice_is_made_once_and_written_down(home: Path) -> None:
    done = sftdist(["train", *LINE, *FEW, "launch.nproc=2", "run.dir=runs/auto"], home)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("auto: ")]
    assert len(said) == 2, "the ranks do not choose again"
    assert "2 x CPU rank" in said[0]
    cfg = read_config(home / "runs/auto")
    assert cfg.auto
    assert not cfg.model.activation_checkpointing, "the preset recomputes, and here is room"
    assert f"zero.stage={cfg.zero.stage} " in said[0]


@pytest.mark.long
def test_a_dry_run_says_what_would_be_chosen(home: Path) -> None:
    done = sftdist(["train", *LINE, *FEW, "launch.nproc=2", "dry_run=true", "run.dir=runs/dry"], home)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("auto: 2 x CPU rank")
    assert not (home / "runs/dry").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_another_choice_on_another_number_of_ranks(home: Path) -> None:
    """Two ranks of a bare torchrun, stopped; then one rank that recomputes: the same rows, and the same losses."""
    whole = sftdist(["train", *LINE, "launch.nproc=2", "train.startup_checks=false", "run.dir=runs/whole"], home)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    line = [*LINE, "train.startup_checks=false", "run.dir=runs/cut"]
    with Running([*torchrun(), *line], home) as job:
        job.until_step(home / "runs/cut", 3)
        job.tell(signal.SIGUSR2, job.ranks()[1])
        assert job.end() == 0, job.screen
        assert job.screen.count("settings looked at") == 1, "rank 0 chooses for all"
    again = ["model.activation_checkpointing=true", "model.recompute_layers=1"]
    with Running([*TRAIN, *line, *again, "launch.nproc=1"], home) as job:
        assert job.end() == 0, job.screen
        assert "1 x CPU rank" in job.screen
    cfg = read_config(home / "runs/cut")
    assert (cfg.model.activation_checkpointing, cfg.model.recompute_layers) == (True, 1)
    assert metrics(home / "runs/cut", "step", "rows") == metrics(home / "runs/whole", "step", "rows")
    cut, uncut = (metrics(home / name, "loss") for name in ("runs/cut", "runs/whole"))
    assert [value for (value,) in cut] == pytest.approx([value for (value,) in uncut], rel=1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_recomputed_layers_change_no_bit(home: Path) -> None:
    """So these keys are no part of what identifies a run."""
    some = ["model.activation_checkpointing=true", "model.recompute_layers=1"]
    for name, words in {
        "kept": ["model.activation_checkpointing=false"],
        "all": ["model.activation_checkpointing=true"],
        "some": some,
    }.items():
        line = [*LINE, *words, *FEW[1:], "zero.stage=1", "train.max_steps=6", "launch.nproc=2", f"run.dir=runs/{name}"]
        done = sftdist(["train", *line], home)
        assert done.returncode == 0, done.stdout + done.stderr
    exact = [metrics(home / f"runs/{name}", "step", "loss", "grad_norm") for name in ("kept", "all", "some")]
    assert exact[0] == exact[1] == exact[2] != []
