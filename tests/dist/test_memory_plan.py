"""The memory that plans predict, against what ranks hold: every part of the training state, and the peak of a step."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.memory import SETTINGS, SMALL, Setting, engine_of, measure, pack, row, step
from sftdist.core.distributed import World
from sftdist.model import cost
from tests.ranks import run_ranks

SHAPE = {**SMALL, "hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 3}
BUCKET = 2**10
STATE = ("weights", "gradients", "masters", "optimizer")
HELD = [*(Setting(stage) for stage in range(4)), Setting(1, "fp32"), *(Setting(stage, lora=True) for stage in (1, 3))]


def tensors_held() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors of this process by its address; gradients are not seen by the collector."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [one.grad for one in tensors if one.is_leaf and one.grad is not None]
    return {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}


def held_between_micro_batches(world: World, settings: list[Setting]) -> list[int]:
    found = []
    for setting in settings:
        before = tensors_held()  # and it is held on to, so that no address is used again
        engine = engine_of(setting, SHAPE, world, BUCKET)
        batch = pack(64, SHAPE["vocab_size"])
        step(engine, batch)  # the optimizer makes its moments
        engine.forward_backward(batch, scale=1e-3, last=False)
        held = tensors_held()
        found.append(sum(storage.nbytes() for address, storage in held.items() if address not in before))
        del held
        engine.forward_backward(batch, scale=1e-3, last=True)
        engine.step(1e-4)
        engine.close()
    return found


def test_the_state_that_ranks_hold_is_what_was_predicted() -> None:
    for setting, held in zip(HELD, run_ranks(held_between_micro_batches, 2, HELD)[0], strict=True):
        parts = cost.memory(SHAPE, setting.setup(2, SHAPE, BUCKET))
        predicted = sum(parts[part] for part in STATE)
        assert predicted == pytest.approx(held, rel=0.05), f"{setting}: {predicted:,.0f} predicted, {held:,} held"


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_resident_memory_is_within_a_tenth_of_what_was_predicted(setting: Setting) -> None:
    found = row(setting, run_ranks(measure, 2, setting, timeout=600)[0])
    assert 0.9 < found["peak ratio"] < 1.1, found
