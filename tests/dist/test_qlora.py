"""QLoRA on two ranks: every ZeRO stage takes the steps of one process, resumes bit-equal, and exports what it trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sftdist.core.distributed import World
from sftdist.model.lora import LoraSpec
from sftdist.model.quantised import is_quantised
from sftdist.training.checkpoint import Checkpoints
from sftdist.training.retention import Keep
from tests.ranks import run_ranks
from tests.training_cases import (
    ADAMW,
    NO_PERSISTENCE,
    Case,
    Run,
    distance,
    make_engine,
    packs_of,
    train_case,
    train_step,
    weights_of,
)

CPU = torch.device("cpu")
STAGES = (0, 1, 2, 3)
RATES = (1e-2, 5e-3, 1e-3)
DROPOUT = LoraSpec(r=4, alpha=8.0, dropout=0.1)


def case(stage: int, precision: str = "fp32", **more: Any) -> Case:
    lora = LoraSpec(r=4, alpha=8.0)
    return replace(Case(stage, precision, "llama_tied", ADAMW, lrs=RATES, lora=lora, double_quant=True), **more)


@dataclass(frozen=True)
class Resumed:
    """Losses, norms and weights after three steps, the last one after a resume in the second run."""

    plain: Run
    again: Run


@dataclass(frozen=True)
class Found:
    """Of one rank."""

    runs: dict[tuple[int, str], Run]
    recomputed: Run
    resumed: dict[int, Resumed]
    gathered: tuple[int, int]


def step_of(engine: Any, world: World, step: int) -> tuple[list[float], list[float]]:
    loss, outcome = train_step(engine, world, packs_of(step), RATES[step])
    return [loss], [outcome.grad_norm]


def resume(world: World, todo: Case, folder: Path) -> Resumed:
    checkpoints = Checkpoints(folder, Keep(1))
    torch.manual_seed(world.rank)  # for dropout
    engine = make_engine(todo, world)
    for step in range(2):
        step_of(engine, world, step)
    checkpoints.save(engine, {}, 2)
    plain = Run(*step_of(engine, world, 2), weights_of(engine))
    engine.close()
    engine = make_engine(todo, world)
    assert checkpoints.load_latest(engine) is not None
    again = Run(*step_of(engine, world, 2), weights_of(engine))
    engine.close()
    return Resumed(plain, again)


def gathered_weights(world: World) -> tuple[int, int]:
    """4-bit weights that ZeRO 3 gathers for a forward, and those of them that are still there at its end, in a module
    whose activations are computed again, where nothing is kept by DeepSpeed for the backward."""
    keys: dict[str, Any] = NO_PERSISTENCE["zero_optimization"]
    keys |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    engine = make_engine(case(3, checkpointing=True), world)
    seen: list[StorageWeakRef] = []

    def note(module: Any, inputs: Any) -> None:
        seen.append(StorageWeakRef(module.weight.untyped_storage()))

    for module in engine.module.modules():
        if isinstance(module, torch.nn.Linear) and is_quantised(module.weight):
            module.register_forward_pre_hook(note)
    output = engine._core.forward(packs_of(0)[0].inputs())
    still_there = sum(not reference.expired() for reference in seen)
    assert output.sum.requires_grad
    engine.close()
    return len(seen), still_there


def everything(world: World, folder: str) -> Found:
    runs = {(stage, "fp32"): train_case(world, case(stage)) for stage in STAGES}
    runs |= {(stage, "bf16"): train_case(world, case(stage, "bf16")) for stage in (0, 2)}
    recomputed = train_case(world, case(2, checkpointing=True))
    resumed = {
        stage: resume(world, case(stage, "bf16", lora=DROPOUT), Path(folder) / str(stage)) for stage in (0, 2, 3)
    }
    return Found(runs, recomputed, resumed, gathered_weights(world))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    first: Found = run_ranks(everything, 2, str(tmp_path_factory.mktemp("qlora")), timeout=280)[0]
    return first


def alone(precision: str = "fp32", **more: Any) -> Run:
    """The same steps in this process."""
    return train_case(World(0, 1, 0, CPU), case(0, precision, **more))


def test_every_stage_takes_the_steps_of_one_process(found: Found) -> None:
    """As LoRA's: to the rounding of float32 sums. The weights are all of the model's, the 4-bit ones made whole."""
    expected = {precision: alone(precision) for precision in ("fp32", "bf16")}
    for (stage, precision), run in found.runs.items():
        wanted = expected[precision]
        assert run.losses == pytest.approx(wanted.losses, rel=1e-6), (stage, precision)
        assert run.norms == pytest.approx(wanted.norms, rel=1e-5), (stage, precision)
        assert distance(run.weights, wanted.weights) < 1e-6, (stage, precision)
    single = alone(double_quant=False)
    assert distance(single.weights, expected["fp32"].weights) > 1e-5, "the measure tells two quantisations apart"
    assert single.losses != pytest.approx(expected["fp32"].losses, rel=1e-6)


def test_recomputed_activations_change_nothing(found: Found) -> None:
    plain = found.runs[2, "fp32"]
    assert found.recomputed.losses == plain.losses
    assert distance(found.recomputed.weights, plain.weights) < 1e-7


def test_resumed_runs_are_bit_equal(found: Found) -> None:
    for stage, pair in found.resumed.items():
        assert pair.again.losses == pair.plain.losses, stage
        assert pair.again.norms == pair.plain.norms, stage
        assert all((pair.again.weights[name] == value).all() for name, value in pair.plain.weights.items()), stage


def test_zero_3_lets_go_of_gathered_weights(found: Found) -> None:
    """bitsandbytes' own layer would hold on to all of them until the backward."""
    seen, still_there = found.gathered
    assert seen == 14
    assert still_there == 0
