"""Start-up check 9: a real forward and backward on the costliest pack, so that a lack of memory shows in minute one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from sftdist.core.distributed import World
from sftdist.core.errors import StartupError
from sftdist.core.settings import TrainConfig
from sftdist.data.corpus import Corpus
from sftdist.data.loader import Batch, Document, pack_documents
from sftdist.data.plan import Plan
from sftdist.model import cost
from sftdist.model.checks import is_mixture
from sftdist.training.build import Trained, memory_setup
from sftdist.training.meter import memory_gib
from sftdist.training.shortage import available_bytes, ran_out_of_memory, reason_of, shortage
from sftdist.training.startup import LocalFailure, check_gradients, compare_memory

CANDIDATES = 2048  # conversations per source looked at for the costliest pack


def probe_figures(cfg: TrainConfig, corpus: Corpus, plan: Plan, trained: Trained, world: World) -> str:
    """Forward and backward of `loss * 0` on the costliest pack that this run can hold; does every trained tensor get
    a gradient? Raises LocalFailure on a rank that runs out of memory, with the overrides that would fit."""
    batch = costliest_pack(corpus, plan.spec.pack_tokens, packing=plan.spec.packing)
    trainable = trained.coverage.trainable if trained.coverage else None
    module, mapping = trained.engine.module, trained.config.to_dict()
    reason = None
    with gradients_reached(module) as reached:
        try:
            trained.engine.probe(batch)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            reason = reason_of(error)
    if reason is not None:  # outside of the handler: the error held on to every tensor of the failed pass
        happened = f"rank {world.rank} cannot hold the costliest pack of {len(batch.ids):,} tokens ({reason})"
        raise LocalFailure(shortage(cfg, mapping, world, happened, trainable=trainable))
    setup = memory_setup(cfg, stage=cfg.zero.stage, world=world.size, trainable=trainable, device=world.device.type)
    predicted = cost.total(cost.memory(mapping, setup))
    measured, available = memory_gib(world.device) * cost.GIB, available_bytes(world)
    if measured > available:
        happened = f"{measured / cost.GIB:.2f} GiB were measured on the costliest pack"
        raise StartupError(shortage(cfg, mapping, world, happened, trainable=trainable, measured=measured))
    used = compare_memory(predicted, measured, available)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return f"{used}; {check_gradients(names, reached, may_miss=is_mixture(trained.config))}"


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


def costliest_pack(corpus: Corpus, pack_tokens: int, *, packing: bool) -> Batch:
    """The longest conversations that one pack holds: the most attention, and every token of the pack. Without packing
    the longest one alone."""
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
            room = room - length if packing else 0
    return pack_documents(chosen)
