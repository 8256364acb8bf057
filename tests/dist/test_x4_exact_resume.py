"""X4, A6, S21: a run that is killed in each of its three epochs is, bit by bit, the run that nobody touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdist.core.storage import MANIFEST, read_json, read_jsonl
from sftdist.data.loader import Loader, Step
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.engine import Engine
from tests.e2e.workshop import evaluations, metrics, model_folder, rows, status
from tests.faults import Fault, Job

RANKS = 2
EPOCHS = 3
ENDS = (0.28, 0.5, 0.85)  # of the run's steps: inside epochs 1, 2 and 3, and not where a checkpoint is due
SIZES = {"large": 60, "small": 12}  # conversations; with its lambda, `small` is seen seven times in three epochs
MEASURED = ("step_seconds", "tokens_per_second", "mfu", "data_wait_seconds", "memory_gib")


@dataclass(frozen=True)
class Case:
    """One run. `how`: the way it ends in each epoch, all ranks killed or one of them asked to stop; "": it does not."""

    stage: int
    method: str
    mode: str
    how: tuple[str, str, str] = ("kill", "kill", "kill")
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"zero{self.stage}-{self.method}-{self.mode}"

    def overrides(self, run_dir: str) -> list[str]:
        more = ["tune.dropout=0.1"] if self.method == "lora" else []
        if self.stage == 3:  # else DeepSpeed keeps every parameter of a model this small whole
            more.append("+zero.deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
        return [
            f"+exp={self.method}",
            "model.path=model",
            "+data.sources.large.path=large.jsonl",
            "+data.sources.large.lam=0.6",
            "+data.sources.small.path=small.jsonl",
            "+data.sources.small.lam=0.4",
            "data.val=val.jsonl",
            "data.max_len=256",
            "data.workers=1",
            f"data.mix_mode={self.mode}",
            "precision=fp32",
            f"zero.stage={self.stage}",
            f"train.epochs={EPOCHS}",
            "train.packs_per_step=4",
            "train.window=24",  # a window is two steps: a position is mostly inside of one
            "optimizer.lr=1e-3",
            "checkpoint.every_steps=3",
            "eval.every_steps=6",
            "tracking.wandb=disabled",
            f"run.dir={run_dir}",
            *more,
            *self.more,
        ]


UNCHECKED = ("train.startup_checks=false",)  # they leave no trace (tests/e2e), and take time
COVER = [
    Case(0, "lora", "sampling"),
    Case(1, "full", "loss", ("kill", "term", ""), UNCHECKED),
    Case(2, "lora", "loss", ("", "term", "kill"), (*UNCHECKED, "checkpoint.background=true")),
    Case(3, "full", "sampling", more=UNCHECKED),
]
REST = [
    case
    for stage, method, mode in product(range(4), ("full", "lora"), ("sampling", "loss"))
    if (case := Case(stage, method, mode)).name not in [covered.name for covered in COVER]
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    model_folder(folder / "model")
    made = rows(sum(SIZES.values()) + 6)
    for name, count in (*SIZES.items(), ("val", 6)):
        mine, made = made[:count], made[count:]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    return folder


def end(how: str, when: float, run_dir: str, rank: int, pipe: Connection) -> None:
    """The fault: after this part of the run's steps every rank is killed, or rank 1 is asked to stop."""
    take = Loader.take

    def last_take(loader: Loader) -> Step:
        taken = take(loader)
        if taken.step == int(when * read_json(Path(run_dir) / "plan.json")["steps"]):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return taken

    Loader.take = last_take  # type: ignore[method-assign,assignment]


def forget(what: str, rank: int, pipe: Connection) -> None:
    """A wrong program: it resumes without something that a checkpoint holds. It ends by itself two steps later."""
    load, take = Checkpoints.load_latest, Loader.take
    taken: list[Step] = []

    def forgetful_load(checkpoints: Checkpoints, engine: Engine, *arguments: Any) -> dict[str, Any] | None:
        saved = load(checkpoints, engine, *arguments)
        assert saved is not None
        if what == "the position":
            saved["data"] = None
        elif what == "the pass":
            window = saved["data"]["window"]
            window["drawn"] = [drawn % size for drawn, size in zip(window["drawn"], SIZES.values(), strict=True)]
        elif what == "the random state":
            torch.manual_seed(rank)
        return saved

    def counted_take(loader: Loader) -> Step:
        taken.append(take(loader))
        if len(taken) == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken[-1]

    Checkpoints.load_latest = forgetful_load  # type: ignore[method-assign,assignment]
    Loader.take = counted_take  # type: ignore[method-assign,assignment]


@dataclass(frozen=True)
class Outcome:
    """`whole`, `cut`: the run directories of a run that nobody touched and of one that was ended three times.

    `half`: a copy of the second as its second end left it. `epochs`: the epoch (from 0) of each end. `repeated`: steps
    that were run again.
    """

    whole: Path
    cut: Path
    half: Path
    epochs: list[int]
    repeated: int


@cache
def outcome(home: Path, case: Case) -> Outcome:
    whole, cut, half = (f"runs/{case.name}-{kind}" for kind in ("whole", "cut", "half"))
    almost_to_the_end(home, case, whole)
    done_by = list(accumulate(targets for (targets,) in metrics(home / whole, "supervised_tokens")))
    per_epoch = read_json(home / whole / "plan.json")["targets"] / EPOCHS
    epochs: list[int] = []
    repeated = 0
    for how, when in [(how, when) for how, when in zip(case.how, ENDS, strict=True) if how]:
        if len(epochs) == 2:
            shutil.copytree(home / cut, home / half)
        job(home, case, cut, partial(end, how, when, cut), -signal.SIGKILL if how == "kill" else 0)
        done = len(metrics(home / cut, "step"))
        epochs.append(int(done_by[done - 1] / per_epoch))
        repeated += done - saved_step(home / cut)
    almost_to_the_end(home, case, cut)
    return Outcome(home / whole, home / cut, home / half, epochs, repeated)


def almost_to_the_end(home: Path, case: Case, run_dir: str) -> None:
    """Stopped in its last steps: a checkpoint holds what the export would, and the export would take longest."""
    job(home, case, run_dir, partial(end, "term", 0.9, run_dir), 0)
    assert status(home / run_dir)["state"] == "preempted"


def job(home: Path, case: Case, run_dir: str, fault: Fault, code: int) -> None:
    with Job(RANKS, case.overrides(run_dir), home, fault) as ranks:
        assert ranks.codes() == [code] * RANKS, ranks.screen()


def saved_step(run_dir: Path) -> int:
    return int((run_dir / "LATEST").read_text().strip().rpartition("-")[2])


def saved_files(run_dir: Path) -> dict[str, str]:
    """The sha256 of every tensor file of the newest checkpoint: weights, moments and random states."""
    files = read_json(run_dir / (run_dir / "LATEST").read_text().strip() / MANIFEST)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, evaluations too, without what a clock says."""
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in read_jsonl(run_dir / "metrics.jsonl")
    ]


def row_ids(run_dir: Path) -> list[list[str]]:
    return [line["rows"] for line in read_jsonl(run_dir / "log/rows.jsonl")]


def passes(steps: list[list[str]], source: str) -> list[list[str]]:
    """The rows of a source in the order of their first, second, ... occurrence: one list a pass, whole passes only."""
    seen: Counter[str] = Counter()
    orders: dict[int, list[str]] = defaultdict(list)
    for row in (row for step in steps for row in step if row.startswith(f"{source}/")):
        orders[seen[row]].append(row)
        seen[row] += 1
    return [order for order in orders.values() if len(order) == SIZES[source]]


@pytest.mark.parametrize(
    "case",
    [*COVER, *(pytest.param(case, marks=pytest.mark.long) for case in REST)],
    ids=lambda case: case.name,
)
def test_ended_in_every_epoch_and_resumed_is_the_same_run(home: Path, case: Case) -> None:
    found = outcome(home, case)
    assert found.epochs == [epoch for epoch in range(EPOCHS) if case.how[epoch]]
    assert found.repeated >= case.how.count("kill")
    assert lines_of(found.cut) == lines_of(found.whole)
    assert [line["step"] for line in evaluations(found.cut)] == [6, 12, 18]
    assert row_ids(found.cut) == row_ids(found.whole)
    assert saved_files(found.cut) == saved_files(found.whole)


@pytest.mark.parametrize("what", ["the position", "the pass", "the random state"])
def test_a_resume_that_forgets_something_is_seen(home: Path, what: str) -> None:
    """The measure rejects it: two steps are enough."""
    found = outcome(home, COVER[0])
    spoiled = f"runs/without {what}".replace(" ", "-")
    shutil.copytree(found.half, home / spoiled)
    job(home, COVER[0], spoiled, partial(forget, what), 0)
    first = saved_step(found.half)
    right, wrong = (
        [line for line in lines_of(run) if line["kind"] == "train"] for run in (found.whole, home / spoiled)
    )
    assert len(wrong) == first + 2
    assert wrong[:first] == right[:first]
    assert [line["loss"] for line in wrong[first:]] != [line["loss"] for line in right[first : first + 2]]
    same_rows = row_ids(home / spoiled) == row_ids(found.whole)[: first + 2]
    assert same_rows == (what == "the random state")


def test_each_pass_over_a_source_has_an_order_of_its_own(home: Path) -> None:
    """S21, in what was trained on: the passes differ, within a run and after it was resumed."""
    orders = passes(row_ids(outcome(home, COVER[0]).cut), "small")
    assert len(orders) >= 5
    assert len(set(map(tuple, orders))) == len(orders)
