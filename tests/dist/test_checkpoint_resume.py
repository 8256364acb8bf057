"""X4, A5, A11: an engine that was interrupted and resumed goes on bit by bit, and what its checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sftdist.core.distributed import World
from sftdist.model.lora import LoraSpec
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.engine import Engine
from sftdist.training.retention import Keep
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, SGD, Case, Run, make_engine, packs_of, train_step, weights_of

LORA = LoraSpec(r=4, alpha=8.0, dropout=0.1)
STEPS = 4
CASES = {
    "zero1-full": Case(1, optimizer=ADAMW),
    "zero2-lora": Case(2, optimizer=ADAMW, lora=LORA),
    "zero0-full-bf16": Case(0, "bf16", optimizer=ADAMW),
    "zero1-full-bf16": Case(1, "bf16", optimizer=ADAMW),
    "zero3-full": Case(3, optimizer=ADAMW),
    "zero3-lora-bf16": Case(3, "bf16", optimizer=ADAMW, lora=LORA),
    "zero2-sgd": Case(2, optimizer=SGD),
}


def continue_run(world: World, engine: Engine, first: int, last: int) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in range(first, last):
        loss, outcome = train_step(engine, world, packs_of(step), 1e-2)
        losses.append(loss)
        norms.append(outcome.grad_norm)
    return losses, norms


def begin(world: World, case: Case, folder: str) -> Run:
    """Steps 0 to 3, with a checkpoint after step 2; the figures of steps 2 and 3, and the weights at the end."""
    torch.manual_seed(world.rank)
    engine = make_engine(case, world)
    continue_run(world, engine, 0, 2)
    Checkpoints(Path(folder) / "checkpoints", Keep(1)).save(engine, {"marker": 7}, 2)
    losses, norms = continue_run(world, engine, 2, STEPS)
    run = Run(losses, norms, weights_of(engine))
    engine.close()
    return run


def resume(world: World, case: Case, folder: str, spoil: str = "") -> Run:
    """The same figures from the checkpoint, in a process (and with a random state) that knows nothing else.

    `spoil`: forget something on purpose, the random state or the optimizer's count of updates.
    """
    torch.manual_seed(1000 + world.rank)
    engine = make_engine(case, world)
    state = Checkpoints(Path(folder) / "checkpoints", Keep(1)).load_latest(engine)
    assert state is not None
    assert state["marker"] == 7
    assert state["checkpoint"]["step"] == 2
    if spoil == "random state":
        torch.manual_seed(1000 + world.rank)
    if spoil == "updates":
        engine._set_updates(0)
    losses, norms = continue_run(world, engine, 2, STEPS)
    run = Run(losses, norms, weights_of(engine))
    engine.close()
    return run


def begin_all(world: World, folder: str) -> dict[str, Run]:
    return {name: begin(world, case, f"{folder}/{name}") for name, case in CASES.items()}


def resume_all(world: World, folder: str) -> dict[str, Run]:
    return {name: resume(world, case, f"{folder}/{name}") for name, case in CASES.items()}


def resume_spoiled(world: World, folder: str) -> list[Run]:
    name = "zero2-lora"
    return [resume(world, CASES[name], f"{folder}/{name}", spoil) for spoil in ("random state", "updates")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Run]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(begin_all, 2, str(folder))[0]


def test_resumed_run_is_bit_equal(saved: tuple[Path, dict[str, Run]]) -> None:
    """X4. Losses, gradient norms and weights, dropout included."""
    folder, expected = saved
    for name, run in run_ranks(resume_all, 2, str(folder))[0].items():
        assert run.losses == expected[name].losses, name
        assert run.norms == expected[name].norms, name
        assert all((run.weights[key] == value).all() for key, value in expected[name].weights.items()), name


def test_a_forgetful_resume_is_seen(saved: tuple[Path, dict[str, Run]]) -> None:
    """The measure of X4 rejects a resume that lost the random state (dropout), or AdamW's step."""
    folder, expected = saved
    for run in run_ranks(resume_spoiled, 2, str(folder))[0]:
        assert run.losses != expected["zero2-lora"].losses


def test_no_file_is_a_pickle(saved: tuple[Path, dict[str, Run]]) -> None:
    """A11: every file opens with safetensors or JSON."""
    files = [path for path in saved[0].rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                assert list(opened.keys())
        elif path.name != "LATEST":
            json.loads(path.read_text())


def test_lora_saves_what_trains_only(saved: tuple[Path, dict[str, Run]]) -> None:
    folder, _ = saved
    state = json.loads((folder / "zero2-lora/checkpoints/step-00000002/state.json").read_text())
    assert state["parameters"]
    assert all("lora_" in name for name in state["parameters"])
