"""Compiled layers: the same loss and gradients under the same names, and no new graph for a pack of another length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError
from sftdist.model.compiled import compile_layers
from sftdist.model.load import decoder_layers, enable_checkpointing
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import LossModel
from sftdist.training.engine import Engine
from sftdist.training.zero_config import EngineSpec
from tests.models import tiny_model
from tests.packed import gradients, random_row
from tests.training_cases import NO_PERSISTENCE, SGD, packs_of, train_step

TOLERANCE = 2e-6  # float32, relative to the norm: a graph may round in another order
PACKS = [[7, 21, 5], [9, 4], [40], [3, 3, 4, 4, 9], [17], [30, 31]]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def lora(model: Any) -> Any:
    torch.manual_seed(0)
    return attach(model, LoraSpec(r=4, alpha=8))[0]


def recomputed(model: Any) -> Any:
    enable_checkpointing(model, layers=1)
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {"plain": lambda model: model, "lora": lora, "recomputed": recomputed}


def pair(family: str, change: str = "plain", backend: str = "aot_eager") -> tuple[LossModel, LossModel]:
    """The same loss model twice, the second one compiled."""
    eager, compiled = (CHANGES[change](tiny_model(family)) for _ in range(2))
    compile_layers(compiled, backend)
    return LossModel(eager, 2).train(), LossModel(compiled, 2).train()


def assert_equal(eager: LossModel, compiled: LossModel, lengths: list[int]) -> None:
    row = random_row(lengths, seed=len(lengths))
    expected, found = eager(**row.fields()), compiled(**row.fields())
    ours, theirs = gradients(compiled, found.sum), gradients(eager, expected.sum)
    for value, exact in ((found.per_source, expected.per_source), (ours, theirs)):
        assert (value - exact).norm() <= TOLERANCE * exact.norm()


def test_packs_of_any_length_need_no_new_graph() -> None:
    eager, compiled = pair("llama")
    for lengths in PACKS[:3]:  # a second length and a pack of one document make a graph each
        assert_equal(eager, compiled, lengths)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for lengths in [*PACKS[3:], [1]]:
        assert_equal(eager, compiled, lengths)
    with torch.no_grad():
        compiled.eval()(**random_row([11, 12]).fields())
    assert counters["stats"]["unique_graphs"] == graphs


def test_models_that_are_loaded_or_compiled_later_change_nothing() -> None:
    eager, compiled = pair("llama")
    pair("llama")
    assert_equal(eager, compiled, [7, 21, 5])


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "change"),
    [("llama", "lora"), ("llama", "recomputed"), ("qwen3", "plain"), ("gemma2", "recomputed"), ("mixtral", "plain")],
)
def test_loss_and_gradients(family: str, change: str) -> None:
    eager, compiled = pair(family, change)
    for lengths in PACKS[:4]:
        assert_equal(eager, compiled, lengths)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.long
def test_loss_and_gradients_of_the_compiler_that_is_used() -> None:
    eager, compiled = pair("llama", "recomputed", "inductor")
    for lengths in PACKS[:4]:
        assert_equal(eager, compiled, lengths)


def test_names_classes_and_values_stay() -> None:
    eager, compiled = pair("llama_tied", "lora")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), eager.parameters(), strict=True))
    assert [type(layer) for layer in decoder_layers(compiled.model)] == [
        type(layer) for layer in decoder_layers(eager.model)
    ]


def test_a_model_without_marked_layers_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not say what its layers are"):
        compile_layers(model)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_under_the_engine(stage: int) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    losses = []
    for module in pair("llama", "recomputed"):
        engine = Engine(module, SGD, EngineSpec(stage, "fp32", extra=NO_PERSISTENCE if stage else {}), world)
        losses.append([train_step(engine, world, packs_of(step, 4), 0.1)[0] for step in range(3)])
        engine.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
