"""X4 with code of the user's own: a run with an optimizer, a schedule and a loss that nobody here knows is resumed bit
by bit, on 1 and 2 ranks, and refuses to go on with an edited one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.storage import MANIFEST, read_json
from tests.e2e.workshop import metrics, sftdist, status
from tests.interrupted import Case, almost_to_the_end, cut_at, lines_of, row_ids, workplace

CODE = """
import torch
from torch.nn.functional import cross_entropy


class Slow(torch.optim.Optimizer):
    def __init__(self, params, lr, keep=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "keep": keep, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["average"] = torch.zeros_like(parameter)
                    state["size"] = torch.zeros_like(parameter)
                state["step"] += 1
                state["average"].lerp_(parameter.grad, 1 - group["keep"])
                state["size"].lerp_(parameter.grad.abs(), 0.05)
                bias = 1 - group["keep"] ** state["step"]
                parameter.sub_(state["average"] / (state["size"] + 1e-6) / bias, alpha=group["lr"])


def falls(step, total, warmup, min_ratio, *, power=1.0):
    return max(min_ratio, (1 - step / total) ** power) * min(1.0, (step + 1) / (warmup + 1))


def focal(logits, targets, *, gamma=1.0):
    losses = cross_entropy(logits, targets, reduction="none")
    return (1 - (-losses).exp()) ** gamma * losses
"""
OWN = (
    "optimizer.name=own_training:Slow",
    "optimizer.args={keep:0.8}",
    "optimizer.schedule=own_training:falls",
    "optimizer.schedule_args={power:2}",
    "train.loss=own_training:focal",
    "train.loss_args={gamma:2}",
)
EIGHT = (
    "optimizer.name=sftdist.examples.adam8bit:Adam8bit",
    "optimizer.schedule=sftdist.examples.schedules:wsd",
)
UNCHECKED = "train.startup_checks=false"
PARTED = Case(2, "full", "sampling", more=(*OWN, UNCHECKED))
WHOLE = Case(0, "lora", "loss", more=EIGHT)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workplace(tmp_path_factory.mktemp("home"))
    (folder / "own_training.py").write_text(CODE)
    return folder


def tensors(run_dir: Path) -> dict[str, str]:
    files = read_json(run_dir / (run_dir / "LATEST").read_text().strip() / MANIFEST)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        pytest.param(PARTED, 2, id="own-zero2-2-ranks"),
        pytest.param(WHOLE, 1, id="8bit-zero0-1-rank"),
        pytest.param(Case(3, "lora", "loss", more=(*OWN, UNCHECKED)), 2, id="own-zero3", marks=pytest.mark.long),
        pytest.param(Case(0, "full", "loss", more=(*EIGHT, UNCHECKED)), 2, id="8bit-full", marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed_is_the_same_run(home: Path, case: Case, ranks: int) -> None:
    whole, cut = (f"runs/{case.name}-{ranks}-{kind}" for kind in ("whole", "cut"))
    almost_to_the_end(home, case, whole, ranks)
    cut_at(home, case, cut, "kill", 0.5, ranks)
    almost_to_the_end(home, case, cut, ranks)
    assert lines_of(home / cut) == lines_of(home / whole)
    assert row_ids(home / cut) == row_ids(home / whole)
    assert tensors(home / cut) == tensors(home / whole)
    losses = [loss for (loss,) in metrics(home / cut, "loss")]
    assert losses[-1] < losses[0], "it learns"


@pytest.mark.long
def test_an_edited_source_is_seen_on_resume(home: Path) -> None:
    run_dir = f"runs/{PARTED.name}-2-cut"
    assert status(home / run_dir)["state"] == "preempted"
    (home / "own_training.py").write_text(CODE.replace("0.05", "0.06"))
    try:
        ended = sftdist(["train", *PARTED.overrides(run_dir)], home)
    finally:
        (home / "own_training.py").write_text(CODE)
    assert ended.returncode == 2
    assert "optimizer.name: its source, or what that uses of its folder, has been edited since" in ended.stderr
    assert "optimizer.schedule: its source" in ended.stderr, "it stands in the same file"
