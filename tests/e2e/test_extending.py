"""docs/extending.md, as a reader tries it: its modules in the working directory, its commands on a tiny model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from sftdist.core.storage import read_json, read_jsonl
from tests.conftest import ROOT
from tests.documents import pieces, write_modules
from tests.e2e.workshop import SMALL, metrics, model_folder, sftdist, write_rows

COMMANDS = [piece.text for piece in pieces(ROOT / "docs/extending.md") if piece.text.startswith("sftdist ")]
TRAINED = [command for command in COMMANDS if command.startswith("sftdist train +exp=")]
(EVALUATED,) = (command for command in COMMANDS if command.startswith("sftdist evaluate run.dir"))
QUICK = (*(word for word in SMALL if not word.startswith("optimizer.lr")), "precision=fp32", "train.max_steps=6")
TOGETHER = (
    *(
        "+exp=lora",
        "model.path=model",
        *QUICK,
        "optimizer.lr=1e-3",
        "train.packs_per_step=2",
        "checkpoint.every_steps=2",
    ),
    *("+data.sources.chats.path=my.jsonl", "+data.sources.chats.row_function=my_rows:short_ones"),
    *("+data.sources.pairs.path=my.tsv", "+data.sources.pairs.reader=my_reader:read", "data.val_fraction=0.2"),
    *("optimizer.name=my_optimizer:Lion", "+optimizer.args={betas:[0.9,0.95]}", "optimizer.weight_decay=0.1"),
    *("optimizer.schedule=my_schedule:steps_down", "+optimizer.schedule_args={every:0.5}", "optimizer.warmup_ratio=0"),
    *("train.loss=my_loss:focal", "+train.loss_args={gamma:2}"),
    *("tracking.sinks=[my_tracker:Csv]", "train.hooks=[my_hooks:Mirror]", "run.dir=runs/all"),
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    model_folder(folder / "model")
    write_rows(folder / "my.jsonl")
    lines = [f"What is {n} and {n}?\tIt is {2 * n}." for n in range(40)]
    (folder / "my.tsv").write_text("question\tanswer\n" + "\n".join(lines) + "\n")
    write_modules(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(shop: Path) -> Path:
    """One run with all that the page shows."""
    ended = sftdist(["train", *TOGETHER], shop)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return shop / "runs/all"


def test_the_page_shows_each_place() -> None:
    text = " ".join(COMMANDS)
    for key in (
        "row_function=",
        "reader=",
        "optimizer.name=",
        "schedule=",
        "loss=",
        "sinks=",
        "hooks=",
        "evals.probes=",
    ):
        assert f"{key}my_" in text or f"{key}[my_" in text or f"{key}[task,my_" in text, key


def test_all_of_it_in_one_run(run_dir: Path) -> None:
    rows = {row.partition("/")[0] for line in read_jsonl(run_dir / "log/rows.jsonl") for row in line["rows"]}
    assert rows == {"chats", "pairs"}
    figures = metrics(run_dir, "step", "lr", "loss")
    assert [lr for _, lr, _ in figures] == [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4]
    table = [line.split(",") for line in (run_dir / "loss.csv").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in table] == [(step, loss) for step, _, loss in figures]
    copies = sorted(path.name for path in run_dir.with_name("all-copies").iterdir())
    assert copies[-1] == "step-00000006"
    header = read_json(run_dir / "checkpoints/step-00000006/state.json")
    assert header["optimizer"] == {"name": "my_optimizer:Lion", "moments": ["exp_avg"]}
    code = (run_dir / "config.yaml").read_text().partition("\ncode:\n")[2]
    assert [line.split(":")[0].strip() for line in code.splitlines()[:3]] == [
        *("optimizer.name", "optimizer.schedule", "train.loss"),
    ]


@pytest.mark.long
def test_the_probe_is_in_the_report(shop: Path, run_dir: Path) -> None:
    words = shlex.split(EVALUATED.replace("run.dir=R", f"run.dir={run_dir}"))[1:]
    quick = ("evals.max_new_tokens=4", "evals.max_prompts=4", "evals.adversarial=false", "gate.min_prompts=1")
    ended = sftdist([*words, *quick], shop)
    assert ended.returncode in (0, 4), ended.stdout + ended.stderr  # whether it passes is not the question
    (file,) = (run_dir / "report/validation").glob("*report*.json")
    report = json.loads(file.read_text())
    assert "all.polite" in report["metrics"]
    assert len(report["versions"]["my_probe:manners"]) == 64


@pytest.mark.long
@pytest.mark.parametrize("command", TRAINED, ids=range(len(TRAINED)))
def test_each_command_runs(command: str, shop: Path, request: pytest.FixtureRequest) -> None:
    run_dir = f"runs/{request.node.callspec.id}"
    more = (*QUICK, "train.max_steps=2", "train.startup_checks=false", f"run.dir={run_dir}")
    ended = sftdist([*shlex.split(command.replace("=DIR", "=model"))[1:], *more], shop)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(metrics(shop / run_dir, "loss")) == 2
