"""The optimizer and its learning rate: parameter groups, torch's AdamW or SGD, and a schedule in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sftdist.core.extension import is_import_path
from sftdist.training import own_optimizer

# PEFT's trained embedding rows: rows of an embedding table, though they live in a layer of their own.
_EMBEDDING_ROWS = "trainable_tokens_delta"


def lr_at(step: int, *, lr: float, total: int, warmup: int, schedule: str, min_ratio: float) -> float:
    """The learning rate of update number `step`, counted from 0; a pure function, so that nothing is ever resumed.

    Linear warm-up over `warmup` updates that starts above 0 (update 0 uses `lr / (warmup + 1)`), then `cosine`,
    `linear` or `constant`. The peak `lr` is reached at update `warmup`, and the last update, `total - 1`, uses
    exactly `lr * min_ratio` (`constant`: `lr`). Raises ValueError for a step outside the run or another schedule.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is outside the run; it must be at least 0 and below {total}")
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - 1 - warmup)
    if schedule == "constant":
        return lr
    if schedule == "linear":
        return lr * (min_ratio + (1.0 - min_ratio) * (1.0 - progress))
    if schedule == "cosine":
        return lr * (min_ratio + (1.0 - min_ratio) * (0.5 * (1.0 + math.cos(math.pi * progress))))
    raise ValueError(f"schedule {schedule!r} is unknown; it must be cosine, linear or constant")


def decays(module: nn.Module) -> dict[str, bool]:
    """For each trainable parameter of `module`: whether weight decay applies to it.

    Not to norms and biases (anything with fewer than two dimensions), and not to embedding tables: the rows of
    tokens that the data does not hold would shrink towards zero. A tied output head is an embedding table.
    """
    tables = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    return {
        name: len(full_shape(parameter)) >= 2 and id(parameter) not in tables and _EMBEDDING_ROWS not in name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, also where ZeRO 3 has left an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class OptimizerSpec:
    """What to optimize with. `name`: adamw | sgd, or the import path of the user's own, which gets `lr` and `args`; the
    learning rate of an update is given step by step, not here."""

    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr: float = 0.0
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def whole_only(self) -> str:
        """Why it cannot work on parts of parameters, as ZeRO 1-3 would have it; "" where it can. Raises ConfigError."""
        return self._own().whole_only if is_import_path(self.name) else ""

    @property
    def moments(self) -> tuple[str, ...]:
        """The names under which a parameter's optimizer state is kept (tensors of the parameter's shape)."""
        if is_import_path(self.name):
            return self._own().moments
        if self.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()

    def build(self, parameters: Iterable[tuple[Tensor, bool]]) -> Optimizer:
        """An optimizer over (parameter, does it decay) pairs. Raises ValueError for an unknown name."""
        pairs = list(parameters)
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter, decay in pairs if decay], "weight_decay": self.weight_decay},
            {"params": [parameter for parameter, decay in pairs if not decay], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=True)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum)
        if is_import_path(self.name):
            return own_optimizer.make(self.name, groups, self.lr, self.args)
        raise ValueError(f"optimizer {self.name!r} is unknown; it must be adamw, sgd or package.module:name")

    def _own(self) -> own_optimizer.Traits:
        return own_optimizer.traits(self.name, self.lr, self.weight_decay, self.args)


def stage_issues(optimizer: OptimizerSpec, stage: int) -> list[str]:
    """What keeps an optimizer from a ZeRO stage. Raises ConfigError for one of the user's own that is none."""
    if stage == 0 or not (why := optimizer.whole_only):
        return []
    return [f"optimizer.name={optimizer.name} with zero.stage={stage}: {why}; set zero.stage=0"]
