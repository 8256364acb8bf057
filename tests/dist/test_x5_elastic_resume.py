"""X5: saved on four ranks, taken up on three, two and one, at any ZeRO stage: the same state, rows and losses."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from sftdist.core.distributed import World
from sftdist.model.lora import LoraSpec
from sftdist.training.checkpoint import Checkpoints, Keep
from sftdist.training.engine import Engine
from tests import interrupted
from tests.e2e.workshop import metrics
from tests.interrupted import almost_to_the_end, cut_at, lines_of, row_ids, saved_step, workplace
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, SGD, Case, make_engine, packs_of, train_step

LORA = LoraSpec(r=4, alpha=8.0)
SAVED = {
    "full-zero2": Case(2, optimizer=ADAMW),
    "full-zero3": Case(3, optimizer=ADAMW),
    "lora-zero2": Case(2, optimizer=ADAMW, lora=LORA),
    "lora-zero3": Case(3, optimizer=ADAMW, lora=LORA),
    "bf16-zero2": Case(2, "bf16", optimizer=ADAMW),
    "sgd-zero2": Case(2, optimizer=SGD),
}
OTHER_SHAPES = [(2, [0, 1, 2, 3]), (1, [0, 3]), (3, [1, 2]), (4, [0, 1, 3])]
PACKS = 12  # in a step: each of these numbers of ranks divides them
STEPS = 4  # two before the checkpoint, two after it
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Taken:
    """What an engine holds after a load (all of it gathered) and the losses of its next two steps."""

    state: State
    updates: float
    losses: list[float]


def state_of(engine: Engine) -> State:
    """Value and moments of every trainable parameter."""
    return {f"{name}/{key}": t.cpu().numpy().copy() for name, tensors in engine.state() for key, t in tensors.items()}


def losses_of(engine: Engine, world: World, steps: range) -> list[float]:
    return [train_step(engine, world, packs_of(step, PACKS), 1e-2)[0] for step in steps]


def save_all(world: World, folder: str) -> dict[str, Taken]:
    """Two steps, a checkpoint, and two more steps that nobody interrupts."""
    found = {}
    for name, case in SAVED.items():
        torch.manual_seed(world.rank)
        engine = make_engine(case, world)
        losses_of(engine, world, range(2))
        Checkpoints(Path(folder) / name / "checkpoints", Keep()).save(engine, {}, 2)
        found[name] = Taken(state_of(engine), engine.updates, losses_of(engine, world, range(2, STEPS)))
        engine.close()
    return found


def load(world: World, folder: str, name: str, stage: int, spoil: bool = False) -> Taken:
    """From the checkpoint of four ranks; `spoil`: forget AdamW's count of updates on purpose."""
    engine = make_engine(replace(SAVED[name], stage=stage), world)
    assert Checkpoints(Path(folder) / name / "checkpoints", Keep()).load_latest(engine) is not None
    if spoil:
        engine._set_updates(0)
    state, updates = state_of(engine), engine.updates
    taken = Taken(state, updates, losses_of(engine, world, range(2, STEPS)))
    engine.close()
    return taken


def load_all(world: World, folder: str, stages: list[int]) -> dict[tuple[str, int], Taken]:
    return {(name, stage): load(world, folder, name, stage) for name, stage in product(SAVED, stages)}


def load_spoiled(world: World, folder: str) -> Taken:
    return load(world, folder, "full-zero2", 3, spoil=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Taken]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(save_all, 4, str(folder))[0]


@pytest.mark.parametrize(
    ("world_size", "stages"),
    [(3, [0, 3]), (1, [1, 2]), *(pytest.param(*shape, marks=pytest.mark.long) for shape in OTHER_SHAPES)],
)
def test_the_state_is_the_saved_one_and_goes_on_alike(
    saved: tuple[Path, dict[str, Taken]], world_size: int, stages: list[int]
) -> None:
    folder, before = saved
    for rank in run_ranks(load_all, world_size, str(folder), stages):
        for (name, stage), taken in rank.items():
            expected = before[name]
            assert sorted(taken.state) == sorted(expected.state), name
            assert all((taken.state[key] == value).all() for key, value in expected.state.items()), (name, stage)
            assert taken.updates == expected.updates == 2
            close = 1e-3 if "bf16" in name else 1e-5
            assert taken.losses == pytest.approx(expected.losses, rel=close), (name, stage)


def test_a_load_without_the_count_of_updates_is_seen(saved: tuple[Path, dict[str, Taken]]) -> None:
    folder, before = saved
    spoiled = run_ranks(load_spoiled, 2, str(folder))[0]
    expected = before["full-zero2"]
    assert spoiled.updates != expected.updates
    assert spoiled.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)  # it is made before the first wrong update
    assert abs(spoiled.losses[1] / expected.losses[1] - 1) > 1e-3


# The whole program: what was trained on, and the curve.

SAME = ("step", "rows", "tokens", "supervised_tokens", "conversations", "lr", "pack_fill")
UNCHECKED = ("train.startup_checks=false",)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("home"))


@cache
def whole_and_cut(home: Path, stage: int, method: str) -> tuple[Path, Path]:
    """On four ranks: a run that nobody touched, and one that was killed in its second epoch."""
    case = interrupted.Case(stage, method, "sampling", dropout=0.0, more=UNCHECKED)
    whole, cut = (f"runs/{case.name}-{kind}" for kind in ("whole", "cut"))
    almost_to_the_end(home, case, whole, ranks=4)
    cut_at(home, case, cut, "kill", 0.5, ranks=4)
    return home / whole, home / cut


TARGETS = [(2, "full", 2, 3), (2, "full", 1, 0)]  # saved at stage, of method, taken up on ranks, at stage
MORE_TARGETS = [
    target for target in product((2, 3), ("full", "lora"), (2, 1, 3), (0, 1, 2, 3)) if target not in TARGETS
]


@pytest.mark.parametrize(
    ("stage", "method", "ranks", "later"),
    [*TARGETS, *(pytest.param(*target, marks=pytest.mark.long) for target in MORE_TARGETS)],
)
def test_a_job_on_other_ranks_trains_on_the_same_rows(
    home: Path, stage: int, method: str, ranks: int, later: int
) -> None:
    whole, cut = whole_and_cut(home, stage, method)
    run_dir = f"runs/{cut.name}-on{ranks}-zero{later}"
    shutil.copytree(cut, home / run_dir)
    resumed = interrupted.Case(later, method, "sampling", dropout=0.0, more=UNCHECKED)
    almost_to_the_end(home, resumed, run_dir, ranks)
    first = saved_step(cut)
    assert 0 < first < len(metrics(whole, "step"))
    assert row_ids(home / run_dir) == row_ids(whole)
    assert metrics(home / run_dir, *SAME) == metrics(whole, *SAME)
    assert lines_of(home / run_dir)[:first] == lines_of(whole)[:first]
    for name, close in (("loss", 1e-5), ("grad_norm", 1e-4)):
        mine, theirs = (metrics(folder, name) for folder in (home / run_dir, whole))
        assert np.array(mine) == pytest.approx(np.array(theirs), rel=close), name
