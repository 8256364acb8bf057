"""X4, S21: a run that was ended in each of its three epochs is, bit by bit, the run that nobody touched."""

from __future__ import annotations

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

from sftdist.core.storage import MANIFEST, read_json
from sftdist.data.loader import Batch, Loader, Step
from sftdist.model.loss import LossOutput
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.engine import Engine
from tests.e2e.workshop import evaluations, metrics, status
from tests.interrupted import (
    EPOCHS,
    SIZES,
    Case,
    almost_to_the_end,
    cut_at,
    job,
    lines_of,
    row_ids,
    saved_step,
    workplace,
)

ENDS = (0.28, 0.5, 0.85)  # of the run's steps: inside epochs 1, 2 and 3, and not where a checkpoint is due
UNCHECKED = ("train.startup_checks=false",)  # they leave no trace (tests/e2e), and take time
COVER = [
    Case(0, "lora", "sampling"),
    Case(1, "full", "loss", ("kill", "term", ""), more=UNCHECKED),
    Case(2, "lora", "loss", ("", "term", "kill"), more=(*UNCHECKED, "checkpoint.background=true")),
    Case(3, "full", "sampling", more=UNCHECKED),
]
REST = [
    case
    for stage, method, mode in product(range(4), ("full", "lora"), ("sampling", "loss"))
    if (case := Case(stage, method, mode)).name not in [covered.name for covered in COVER]
]
REST.append(Case(2, "qlora", "loss", ("", "kill", ""), more=UNCHECKED))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("home"))


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


def end_in_evaluation(step: int, rank: int, pipe: Connection) -> None:
    """The fault: rank 1 is asked to stop while it evaluates after this step."""
    take, evaluate = Loader.take, Engine.evaluate
    reached: list[int] = []

    def noted_take(loader: Loader) -> Step:
        taken = take(loader)
        reached.append(taken.step + 1)
        return taken

    def interrupted_evaluate(engine: Engine, batch: Batch) -> LossOutput:
        if reached[-1:] == [step] and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(engine, batch)

    Loader.take = noted_take  # type: ignore[method-assign,assignment]
    Engine.evaluate = interrupted_evaluate  # type: ignore[method-assign,assignment]


@dataclass(frozen=True)
class Outcome:
    """`whole`, `cut`: the run directories of a run that nobody touched and of one that was ended on its way.

    `half`: a copy of the second as its second end left it, where there is a third. `epochs`: the epoch (from 0) of each
    end. `repeated`: steps that were run again.
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
        cut_at(home, case, cut, how, when)
        done = len(metrics(home / cut, "step"))
        epochs.append(int(done_by[done - 1] / per_epoch))
        repeated += done - saved_step(home / cut)
    almost_to_the_end(home, case, cut)
    return Outcome(home / whole, home / cut, home / half, epochs, repeated)


def saved_files(run_dir: Path) -> dict[str, str]:
    """The sha256 of every tensor file of the newest checkpoint: weights, moments and random states."""
    files = read_json(run_dir / (run_dir / "LATEST").read_text().strip() / MANIFEST)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


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
    job(home, COVER[0], spoiled, partial(forget, what))
    first = saved_step(found.half)
    right, wrong = (
        [line for line in lines_of(run) if line["kind"] == "train"] for run in (found.whole, home / spoiled)
    )
    assert len(wrong) == first + 2
    assert wrong[:first] == right[:first]
    assert [line["loss"] for line in wrong[first:]] != [line["loss"] for line in right[first : first + 2]]
    same_rows = row_ids(home / spoiled) == row_ids(found.whole)[: first + 2]
    assert same_rows == (what == "the random state")


def test_a_stop_in_an_evaluation_ends_it_and_it_is_made_later(home: Path) -> None:
    """A preempted job does not sit it out: it saves and leaves, and the evaluation is the first thing of the next."""
    found = outcome(home, COVER[0])
    cut = home / "runs/evaluating"
    job(home, COVER[0], "runs/evaluating", partial(end_in_evaluation, 12))
    assert (status(cut)["state"], status(cut)["step"], saved_step(cut)) == ("preempted", 12, 12)
    assert [line["step"] for line in evaluations(cut)] == [6]
    almost_to_the_end(home, COVER[0], "runs/evaluating")
    assert lines_of(cut) == lines_of(found.whole)


def test_each_pass_over_a_source_has_an_order_of_its_own(home: Path) -> None:
    """S21, in what was trained on: the passes differ, within a run and after it was resumed."""
    orders = passes(row_ids(outcome(home, COVER[0]).cut), "small")
    assert len(orders) >= 5
    assert len(set(map(tuple, orders))) == len(orders)
