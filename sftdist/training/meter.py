"""Turns the facts of one optimizer step into its line of `metrics.jsonl`; arithmetic only."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sftdist.model.hardware import recognised

GIB = 2**30


@dataclass(frozen=True)
class StepFacts:
    """What is known once a step is done; sums and counts are over all ranks.

    `seconds` is the whole step, waiting for data included. `flops` are those of forward and backward over the
    step's real tokens (attention by true document lengths). `loss_sums` and `loss_weights` are Σ w·ce and Σ w
    per source; `denominator` is the Σ w that the plan gives for the step. `rows` is the sha256 of the ordered row ids.
    """

    step: int
    lr: float
    grad_norm: float
    seconds: float
    data_wait_seconds: float
    tokens: int
    supervised_tokens: float
    conversations: int
    flops: float
    pack_fill: float
    rank_balance: float
    memory_gib: float
    loss_sums: Sequence[float]
    loss_weights: Sequence[float]
    denominator: float
    rows: str


@dataclass(frozen=True)
class Meter:
    """Names the sources and knows the peak of the whole job in FLOP/s (None: unknown, then `mfu` is null)."""

    sources: tuple[str, ...]
    peak_flops_per_second: float | None

    def line(self, facts: StepFacts) -> dict[str, Any]:
        """The training line, with the fields of DESIGN's "Observability"; a source without a target has no loss."""
        total = sum(facts.loss_weights)
        per_source: dict[str, float] = {}
        for name, loss, weight in zip(self.sources, facts.loss_sums, facts.loss_weights, strict=True):
            if weight > 0:
                per_source[f"loss/{name}"] = loss / weight
            per_source[f"share/{name}"] = weight / total if total > 0 else 0.0
        return {
            "step": facts.step,
            "loss": sum(facts.loss_sums) / facts.denominator,
            "lr": facts.lr,
            "grad_norm": facts.grad_norm,
            "tokens": facts.tokens,
            "supervised_tokens": facts.supervised_tokens,
            "conversations": facts.conversations,
            "step_seconds": facts.seconds,
            "tokens_per_second": facts.tokens / facts.seconds,
            "mfu": self.utilisation(facts),
            "pack_fill": facts.pack_fill,
            "rank_balance": facts.rank_balance,
            "data_wait_seconds": facts.data_wait_seconds,
            "memory_gib": facts.memory_gib,
            **per_source,
            "rows": facts.rows,
        }

    def utilisation(self, facts: StepFacts) -> float | None:
        """Model FLOPs utilisation: FLOPs of the model over what the machines could have done in that time."""
        if self.peak_flops_per_second is None:
            return None
        return facts.flops / facts.seconds / self.peak_flops_per_second


def peak_flops(device: torch.device, world_size: int) -> float | None:
    """Peak of the whole job in FLOP/s by the name of the GPU; None for a CPU or a GPU that is not in the list."""
    if device.type != "cuda":
        return None
    gpu = recognised(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.flops * world_size


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the device for CUDA, resident otherwise (ru_maxrss is KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
