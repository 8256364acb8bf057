"""Out of memory: what takes it, part by part, and the cheapest overrides with which the run would fit.

One message for all of a run: start-up check 9, which tries the costliest pack, and whatever runs out later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from sftdist.core import memory
from sftdist.core.distributed import World
from sftdist.core.errors import TrainingError
from sftdist.core.settings import TrainConfig
from sftdist.data.planned import pack_tokens
from sftdist.model import cost
from sftdist.model.hardware import CPU
from sftdist.training.auto import this_machine
from sftdist.training.build import memory_setup, planned_trainable
from sftdist.training.choices import LOSS_CHUNKS, Choice, choices, proposals, typical_step, words_of
from sftdist.training.meter import memory_gib
from sftdist.training.planned_model import planned_config
from sftdist.training.startup import ranks_of_this_host

SHOWN = 3  # overrides
SMALLER = 0.8  # of what was predicted: what overrides aim at after the prediction has proved too low
# Torch has a class for CUDA's allocator only; the one for the CPU and the libraries beside it have words.
WORDS = (
    *("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    "Cuda failure 2 'out of memory'",
)


class OutOfMemory(TrainingError):
    """A rank ran out of memory: another try with the same settings would end the same way."""


@dataclass(frozen=True)
class Way:
    """Overrides that would fit: `needed` bytes a rank, `seconds` a step, whether the same run can go on with them."""

    words: tuple[str, ...]
    needed: float
    seconds: float
    same_run: bool

    def __str__(self) -> str:
        kind = "the same training, also on a resume" if self.same_run else "trains something else: a new run"
        figures = f"{self.needed / cost.GIB:.2f} GiB a rank, {self.seconds:.3g} s a step"
        return f"{' '.join(self.words)}  ({figures}; {kind})"

    @property
    def keys(self) -> set[str]:
        return {word.partition("=")[0] for word in self.words}


@contextmanager
def shortage_explained(cfg: TrainConfig, world: World) -> Iterator[None]:
    """Whatever runs out of memory inside ends with what takes it and what would fit. Raises OutOfMemory; the rank that
    it happens to raises it alone."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        shape = planned_config(cfg, cfg.model.vocabulary or 0).to_dict()
        happened = f"rank {world.rank} ran out of it ({reason_of(error)})"
        raise OutOfMemory(shortage(cfg, shape, world, happened)) from error


def ran_out_of_memory(error: Exception) -> bool:
    """Of the device or the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in WORDS)


def reason_of(error: Exception) -> str:
    """The line of an error that says what could not be had."""
    lines = str(error).strip().split("\n")
    named = next((line for line in lines if any(word in line for word in WORDS)), lines[0])
    return named or type(error).__name__


def shortage(
    cfg: TrainConfig,
    shape: Mapping[str, Any],
    world: World,
    happened: str,
    *,
    trainable: int | None = None,
    measured: float | None = None,
) -> str:
    """The message. `trainable`: parameters of the adapters as they are, None: as planned. `measured`: bytes that the
    run would take, None: nobody knows, only that it is more than there is."""
    device = world.device.type
    adapters = planned_trainable(cfg, shape) if trainable is None else trainable
    setup = memory_setup(cfg, stage=cfg.zero.stage, world=world.size, trainable=adapters, device=device)
    parts = cost.memory(shape, setup)
    available, predicted = available_bytes(world), cost.total(parts)
    ways = ways_out(cfg, shape, aim(parts, available, measured))
    return "\n".join(
        (
            f"memory: {happened}; {available / cost.GIB:.2f} GiB are there, predicted were {predicted / cost.GIB:.2f}",
            f"by part, as predicted for a full pack of {pack_tokens(cfg):,} tokens, in GiB a rank: {by_part(parts)}",
            *_held(world),
            *ways_lines(ways),
        )
    )


def by_part(parts: Mapping[str, float]) -> str:
    """The largest part first; those of no size are left out."""
    named = {**parts, "allowance for fragments": cost.margin(parts)}
    order = sorted((part for part in named if named[part] >= 1e-4 * cost.GIB), key=lambda part: -named[part])
    return ", ".join(f"{part} {named[part] / cost.GIB:.4g}" for part in order)


def aim(parts: Mapping[str, float], available: float, measured: float | None) -> float:
    """What a prediction may come to so that the run fits: less than there is by as much as this one was too low, and
    where nobody knows by how much, less than this one."""
    if measured is not None:
        return available * min(1.0, cost.total(parts) / measured)
    return min(available, cost.total({part: SMALLER * size for part, size in parts.items()}))


def ways_lines(ways: list[Way]) -> list[str]:
    """The end of a message about memory: what to set."""
    if not ways:
        return ["No override is known that would fit: use more ranks, or GPUs with more memory."]
    return ["The cheapest overrides that would fit:", *(f"  {way}" for way in ways)]


def ways_out(cfg: TrainConfig, shape: Mapping[str, Any], budget: float, most: int = SHOWN) -> list[Way]:
    """The cheapest overrides with which the prediction comes to `budget` bytes a rank at most, from the planner.

    First those that change nothing that is trained, by the time of a step; then fewer logits at a time and shorter
    packs; then LoRA and QLoRA. What only adds keys to a cheaper one, or gives them other values, is left out.
    """
    cluster, _ = this_machine(cfg)
    on_gpus = cluster.gpu is not CPU

    def fitting(variant: TrainConfig) -> list[Choice]:
        step = typical_step(variant, shape)
        found = choices(variant, shape, cluster, step, budget, offload=on_gpus)
        return sorted((one for one in found if one.fits), key=lambda one: one.terms.total)

    found: list[Way] = []
    for variant in (cfg, *_smaller(cfg), None):
        if len(found) == most:
            break
        adapted = variant is None
        ones = proposals(cfg, shape, cluster, typical_step(cfg, shape), budget, offload=on_gpus) if adapted else []
        for one in ones if variant is None else fitting(variant):
            way = _way(cfg, one)
            if way.words and len(found) < most and not any(cheaper.keys <= way.keys for cheaper in found):
                found.append(way)
    return found


def _way(cfg: TrainConfig, one: Choice) -> Way:
    words = tuple(_changed(cfg, one.cfg))
    own = ("model.loss_chunk", "train.", "tune.")
    return Way(words, one.needed, one.terms.total, not any(word.startswith(own) for word in words))


def _changed(old: TrainConfig, new: TrainConfig) -> Iterator[str]:
    """The overrides between two configurations."""
    if new.tune.method != old.tune.method:
        yield f"tune.method={new.tune.method}"
    if new.train.pack_tokens != old.train.pack_tokens:
        yield f"train.pack_tokens={new.train.pack_tokens}"
    if new.train.packs_per_step != old.train.packs_per_step:
        yield f"train.packs_per_step={new.train.packs_per_step}"
    yield from (word for word, before in zip(words_of(new), words_of(old), strict=True) if word != before)


def _smaller(cfg: TrainConfig) -> Iterator[TrainConfig]:
    """The same model with less in one forward: fewer logits at a time, packs of one longest conversation."""
    for chunk in LOSS_CHUNKS:
        if chunk < cfg.model.loss_chunk:
            yield replace(cfg, model=replace(cfg.model, loss_chunk=chunk))
    long, short = pack_tokens(cfg), cfg.data.max_len
    if cfg.train.packing and long > short:
        packs = cfg.train.packs_per_step
        same_step = None if packs is None else -(-packs * long // short)
        yield replace(cfg, train=replace(cfg.train, pack_tokens=short, packs_per_step=same_step))


def available_bytes(world: World) -> float:
    """Memory that one rank may use: its GPU, or its part of the host."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return memory.total_bytes() / ranks_of_this_host(world)


def _held(world: World) -> Iterator[str]:
    """What this rank held at its peak, and on a GPU what others hold there."""
    peak = memory_gib(world.device)
    if world.device.type != "cuda":
        yield f"at its peak this rank held {peak:.2f} GiB"
        return
    free, whole = torch.cuda.mem_get_info(world.device)
    mine = torch.cuda.memory_reserved(world.device)
    others = (whole - free - mine) / cost.GIB
    yield (
        f"at its peak this rank held {peak:.2f} GiB in tensors; now its allocator has {mine / cost.GIB:.2f} GiB, and "
        f"{others:.2f} GiB of this GPU are taken by its context and by others"
    )
