"""A micro-batch reads nothing from the device, and an optimizer step once: the program runs ahead of a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.model.lora import LoraSpec
from sftdist.training.engine import Engine
from sftdist.training.loop import Flags, update
from tests.reads import counted_reads
from tests.training_cases import ADAMW, Case, make_engine, make_module, mixed_packs, step_of

WORLD = World(0, 1, 0, torch.device("cpu"))
CASES = {
    "fp32": Case(0, "fp32"),
    "bf16": Case(0, "bf16", optimizer=ADAMW),
    "gemma2": Case(0, "bf16", family="gemma2"),
    "lora, checkpointing": Case(0, "bf16", lora=LoraSpec(r=4, alpha=8), checkpointing=True),
    "ZeRO 1": Case(1, "bf16", optimizer=ADAMW),
    "ZeRO 2": Case(2, "bf16", optimizer=ADAMW),
    "ZeRO 3": Case(3, "bf16", optimizer=ADAMW),
}


@pytest.fixture(params=sorted(CASES))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = make_engine(CASES[request.param], WORLD)
    update(made, step_of(mixed_packs()), WORLD, 1e-3, Flags)  # what happens once belongs to no step
    yield made
    made.close()


def test_a_micro_batch_reads_nothing_and_a_step_once(engine: Engine) -> None:
    packs, step = mixed_packs(), step_of(mixed_packs())
    with counted_reads() as reads:
        for batch in packs:
            engine.forward_backward(batch, scale=0.01, last=False)
    assert reads.calls == []  # by nobody: transformers, PEFT and DeepSpeed included
    engine.step(0.0)
    with counted_reads() as reads:
        update(engine, step, WORLD, 1e-3, Flags)
    if engine.spec.stage == 0:
        assert len(reads.calls) == 1, reads.calls
    else:  # the sums before the update; and the norm, which DeepSpeed leaves on the device
        assert [call.split()[1] for call in reads.ours] == ["read", "step"], reads.calls


def test_without_what_the_loader_knows_the_device_is_asked() -> None:
    """Lengths and places of the targets as tensors alone: what each micro-batch would then wait for."""
    module, batch = make_module(Case(0)), mixed_packs()[0]
    asked = {name: value for name, value in batch.inputs().items() if name not in ("lengths", "index")}
    with counted_reads() as reads:
        expected = module(**batch.inputs()).sum
        assert reads.calls == []
        found = module(**asked).sum
    assert [call.split()[1] for call in reads.ours] == ["_bounds", "supervised_positions"]
    assert torch.equal(found, expected)


def test_the_count_itself() -> None:
    tensor = torch.arange(4.0)
    mask = tensor > 1
    with counted_reads() as reads:
        tensor[0].item()
        bool(mask[0])
        float(tensor[1])
        tensor.tolist()
        mask.nonzero()
        tensor[mask]
        (tensor * 2).index_select(0, torch.tensor([1])).sum()  # no read
    assert len(reads.calls) == 6
    assert all("test_no_waiting.py" in call for call in reads.calls)
