"""`sftdist train replay=R step=N` and `overfit=8`: one step again to the last bit, and a few rows by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.jobs import KEYS
from tests.e2e.workshop import metrics, model_folder, sftdist, status
from tests.faults import Job, contents, train_to_the_end

RUN = (*KEYS, "train.max_steps=6", "checkpoint.every_steps=3")


def report(run_dir: Path, step: int) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run_dir / f"log/replay-{step}.json").read_text())
    return read


def held_by(run_dir: Path) -> dict[str, Any]:
    """Everything in a run's directory, but what a replay writes."""
    return {name: held for name, held in contents(run_dir).items() if not name.startswith("log/replay-")}


def same_bits(run_dir: Path, step: int) -> None:
    """The step's own figures are those of the run's line."""
    found, lines = report(run_dir, step), metrics(run_dir, "step", "loss", "grad_norm", "lr")
    assert [(step, found["loss"], found["grad_norm"], found["lr"])] == [line for line in lines if line[0] == step]


@pytest.mark.long
def test_a_step_again_by_the_real_command(home: Path) -> None:
    done = sftdist(["train", *RUN, "run.dir=runs/real"], home)
    assert done.returncode == 0, done.stdout + done.stderr
    before = held_by(home / "runs/real")
    done = sftdist(["train", "replay=runs/real", "step=5"], home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting 2 ranks" in done.stdout
    assert done.stdout.count("(the same bits as the run's)") == 2
    assert held_by(home / "runs/real") == before
    same_bits(home / "runs/real", 5)


def test_a_step_of_two_ranks_again(home: Path) -> None:
    """Step 5 of a run with a checkpoint after step 3: the same bits, every layer and row, and nothing has changed."""
    run_dir = home / "runs/two"
    train_to_the_end(2, [*RUN, "run.dir=runs/two"], home)
    before = held_by(run_dir)
    said = train_to_the_end(2, ["replay=runs/two", "step=5"], home)
    assert "resuming from step 3" in said
    assert said.count("(the same bits as the run's)") == 2
    assert held_by(run_dir) == before
    same_bits(run_dir, 5)
    found = report(run_dir, 5)
    assert found["found"] is None
    named = {layer["name"]: layer for layer in found["layers"]}
    for name in ("model.layers.0", "model.layers.1"):
        assert min(named[name][key] for key in ("activation", "output_gradient", "weight_gradient")) > 0
    weights = [layer["weight_gradient"] for layer in found["layers"] if layer["weight_gradient"] is not None]
    assert sum(norm**2 for norm in weights) ** 0.5 == pytest.approx(found["grad_norm"], rel=1e-4)
    total = sum(row["loss"] * row["supervised"] for row in found["rows"])
    assert total / sum(row["supervised"] for row in found["rows"]) == pytest.approx(found["loss"], rel=1e-5)
    assert {row["rank"] for row in found["rows"]} == {0, 1}
    assert found["rows"] == sorted(found["rows"], key=lambda row: -row["loss"])


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 3])
def test_from_the_start_and_where_the_run_ended(home: Path, stage: int) -> None:
    """Without an earlier checkpoint from the first weights; the last step; and a second look at the same step."""
    name = f"runs/one-{stage}"
    train_to_the_end(1, [*RUN, f"zero.stage={stage}", f"run.dir={name}"], home)
    before = held_by(home / name)
    for step in (1, 6, 6):
        train_to_the_end(1, [f"replay={name}", f"step={step}"], home)
        same_bits(home / name, step)
    assert held_by(home / name) == before


@pytest.mark.long
def test_a_run_that_failed_in_the_step(home: Path) -> None:
    """The layer whose weight is not a number is named, and the run stays a failed one."""
    folder = model_folder(home / "poisoned")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Job(1, [*RUN, "model.path=poisoned", "run.dir=runs/failed"], home) as job:
        assert job.codes() == [1]
        assert "sftdist train replay=runs/failed step=1" in job.screen()
    before = held_by(home / "runs/failed")
    said = train_to_the_end(1, ["replay=runs/failed", "step=1"], home)
    assert "the first value that is not finite is in the output of model.layers.1.mlp.up_proj" in said
    assert report(home / "runs/failed", 1)["loss"] == "nan"
    assert held_by(home / "runs/failed") == before
    assert status(home / "runs/failed")["state"] == "failed"


REFUSED = {
    "no step": (["replay=runs/base"], "step=None: with replay, required the number of an optimizer step, from 1"),
    "step 0": (["replay=runs/base", "step=0"], "step=0: with replay, required"),
    "no run": (
        ["replay=runs/none", "step=1"],
        "error: replay: given runs/none, required the directory of a run (it holds config.yaml)",
    ),
    "no replay": (["step=3", "+exp=full", "model.path=model", "data.train=my.jsonl"], "step: it goes with replay=R"),
    "another rate": (
        ["replay=runs/base", "step=2", "optimizer.lr=0.5"],
        "optimizer.lr: given 0.5, but the run has 0.001; a replay changes nothing that is trained",
    ),
    "both": (["replay=runs/base", "step=2", "overfit=8"], "overfit: it begins a run of its own"),
    "preset": (["replay=runs/base", "step=2", "+exp=lora"], "leave +exp and run.dir out"),
    "beyond": (["replay=runs/base", "step=7"], "step=7: there is no such step, required 1 to 6"),
    "no rows": (["overfit=0", "+exp=full", "model.path=model", "data.train=my.jsonl"], "overfit=0: required a number"),
}


def refused(home: Path, name: str) -> None:
    words, said = REFUSED[name]
    if not (home / "runs/base").exists():
        train_to_the_end(1, [*RUN, "run.dir=runs/base"], home)
    with Job(1, words, home) as job:
        assert job.codes() == [2], job.screen()
        assert said in job.screen()


def test_what_changes_the_step_is_refused(home: Path) -> None:
    refused(home, "another rate")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"another rate"}))
def test_what_cannot_be_replayed_is_refused(home: Path, name: str) -> None:
    refused(home, name)


def test_eight_rows_by_heart(home: Path) -> None:
    """In a directory of its own, which holds the loss of each step and no model; a second try begins anew."""
    keys = [*RUN, "optimizer.lr=3e-3", "run.dir=runs/mine", "overfit=8"]
    said = train_to_the_end(1, keys, home)
    assert "overfit: the loss of 8 rows fell from" in said
    assert "Loading weights" not in said  # a bar that a log would hold once a tick
    found = json.loads((home / "runs/mine-overfit/overfit.json").read_text())
    assert (found["reached"], found["causes"], found["rows"]) == (True, [], 8)
    assert found["losses"][-1] <= 0.05
    assert not (home / "runs/mine").exists()
    assert not (home / "runs/mine-overfit/checkpoints").exists()
    assert status(home / "runs/mine-overfit")["state"] == "done"


@pytest.mark.long
def test_what_is_broken_ends_the_command_with_its_name(home: Path) -> None:
    done = sftdist(["train", *RUN, "optimizer.lr=1e-7", "run.dir=runs/slow", "overfit=4", "launch.nproc=1"], home)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rate too low: the loss falls, but in" in done.stdout + done.stderr
    assert status(home / "runs/slow-overfit")["state"] == "failed"
