"""Start-up check 9: a real forward and backward on the costliest pack, so that a lack of memory shows in minute one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from sftdist.core import memory
from sftdist.core.distributed import World
from sftdist.core.settings import TrainConfig
from sftdist.data.corpus import Corpus
from sftdist.data.loader import Batch, Document, pack_documents
from sftdist.data.plan import Plan
from sftdist.model import cost
from sftdist.model.checks import is_mixture
from sftdist.training.build import Trained, memory_setup
from sftdist.training.meter import memory_gib
from sftdist.training.startup import LocalFailure, advice, check_gradients, compare_memory, ranks_of_this_host

CANDIDATES = 2048  # conversations per source looked at for the costliest pack
SMALLER = 0.8  # of what was predicted: what overrides aim at after the prediction has proved too low


def probe_figures(cfg: TrainConfig, corpus: Corpus, plan: Plan, trained: Trained, world: World) -> str:
    """Forward and backward of `loss * 0` on the costliest pack that this run can hold; does every trained tensor get
    a gradient? Raises LocalFailure on a rank that runs out of memory, with the overrides that would fit."""
    batch = costliest_pack(corpus, plan.spec.pack_tokens)
    trainable = trained.coverage.trainable if trained.coverage else None
    setup = memory_setup(cfg, stage=cfg.zero.stage, world=world.size, trainable=trainable, device=world.device.type)
    mapping = trained.config.to_dict()
    available = available_bytes(world)
    parts = cost.memory(mapping, setup)
    predicted = cost.total(parts)
    fixes = partial(cost.cheapest_overrides, mapping, setup, max_len=cfg.data.max_len, lora_r=cfg.tune.r)
    module = trained.engine.module
    reason = None
    with gradients_reached(module) as reached:
        try:
            trained.engine.probe(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
    if reason is not None:  # outside of the handler: the error held on to every tensor of the failed pass
        aim = min(available, cost.total({part: SMALLER * size for part, size in parts.items()}))
        raise LocalFailure(
            f"memory: rank {world.rank} cannot hold the costliest pack of {len(batch.ids):,} tokens ({reason}); "
            f"{available / cost.GIB:.1f} GiB are there, {predicted / cost.GIB:.1f} GiB were predicted. "
            f"{advice(fixes(aim))}"
        )
    measured = memory_gib(world.device) * cost.GIB
    used = compare_memory(predicted, measured, available, fixes(available))
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    has_other_parts = trained.config.get_text_config(decoder=True) is not trained.config
    return f"{used}; {check_gradients(names, reached, is_mixture(trained.config) or has_other_parts)}"


def ran_out_of_memory(error: Exception) -> bool:
    """Of the device or the host. Torch's allocator for the CPU has no class for it, only words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def gradients_reached(module: nn.Module) -> Iterator[set[str]]:
    """The names of the parameters whose gradient was made inside, whoever takes the gradient away afterwards."""
    reached: set[str] = set()

    def note(name: str, parameter: torch.Tensor) -> None:
        reached.add(name)

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(note, name))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()


def available_bytes(world: World) -> float:
    """Memory that one rank may use: its GPU, or its part of the host."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return memory.total_bytes() / ranks_of_this_host(world)


def costliest_pack(corpus: Corpus, pack_tokens: int) -> Batch:
    """The longest conversations that one pack holds: the most attention, and every token of the pack."""
    candidates = []
    for number, fitted in enumerate(corpus.fitted):
        places = fitted.longest(CANDIDATES)
        pairs = zip(fitted.lengths[places].tolist(), fitted.rows[places].tolist(), strict=True)
        candidates += [(length, number, row) for length, row in pairs]
    chosen, room = [], pack_tokens
    for length, number, row in sorted(candidates, reverse=True):
        if length <= room:
            ids, weights = corpus.stores[number].tokens(row)
            chosen.append(Document(ids[:length], weights[:length], number, ""))
            room -= length
    return pack_documents(chosen)
