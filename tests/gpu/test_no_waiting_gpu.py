"""On a GPU: a micro-batch makes the program wait for the device nowhere, an optimizer step once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.data.loader import Loader, Step
from sftdist.training.loop import Flags, update
from tests.ranks import run_ranks
from tests.reads import counted_reads
from tests.training_cases import ADAMW, Case, make_engine, mixed_packs, step_of
from tests.unit.data.planning import MemoryStore, plan, table

pytestmark = pytest.mark.gpu


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pinned(step: Step) -> Step:
    """As the loader's thread hands it over."""
    return replace(step, micro=[batch.pinned() for batch in step.micro])


def waits(world: World, case: Case, attention: str) -> tuple[list[str], list[str]]:
    """What waits in a step: all of it, and what is our own. Raises where a micro-batch waits."""
    engine = make_engine(replace(case, attention=attention), world)
    update(engine, pinned(step_of(mixed_packs())), world, 1e-3, Flags)  # kernels are loaded and memory is taken once
    step = pinned(step_of(mixed_packs()))
    with waiting_is_an_error() if case.stage == 0 else nullcontext():  # DeepSpeed waits for its own streams
        for batch in step.micro:
            engine.forward_backward(batch, scale=0.01, last=False)
    engine.step(0.0)
    with counted_reads() as reads:
        update(engine, step, world, 1e-3, Flags)
    engine.close()
    return reads.calls, reads.ours


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("attention", ["torch_varlen", "sdpa"])
def test_a_micro_batch_waits_nowhere_and_a_step_once(stage: int, attention: str) -> None:
    case = Case(stage, "bf16", optimizer=ADAMW, checkpointing=True)
    calls, ours = run_ranks(waits, 1, case, attention)[0]
    if stage == 0:
        assert len(calls) == 1, calls
    else:  # the sums before the update; and the norm, which DeepSpeed leaves on the device
        assert [call.split()[1] for call in ours] == ["read", "step"], calls


def test_the_loader_pins_its_packs_for_a_gpu() -> None:
    sources = [table("a", 40, 1.0)]
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        with Loader(plan(sources), [MemoryStore(sources[0])], device=device) as loader:
            batch = loader.take().micro[0]
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert all(tensor.is_pinned() == (device.type == "cuda") for tensor in tensors)


def test_the_mode_itself() -> None:
    tensor = torch.arange(4.0, device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        tensor.sum().item()
