"""Plain data parallelism (ZeRO 0): every rank holds everything, in float32 where it counts.

DeepSpeed's own stage 0 applies a NaN gradient in fp32, reports a gradient norm of 0, makes its bf16 masters from
rounded weights, starts AdamW at step 1, and sums bf16 gradients in bf16. So this stage is ours: float32 masters and
gradient sums, reduced while the last backward runs, the norm checked before the update. It is also the reference that
the partitioned stages are tested against.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sftdist.core.distributed import World
from sftdist.model.quantised import is_quantised, whole
from sftdist.training.gradients import GradientSums
from sftdist.training.optimizer import OptimizerSpec, decays
from sftdist.training.own_optimizer import read_moment, write_moment
from sftdist.training.zero_config import COMPUTE_DTYPE, EngineSpec


class Replicated:
    """ZeRO 0. Holds the master (float32) of every trainable parameter; in fp32 the parameter is its own master."""

    def __init__(self, module: nn.Module, optimizer: OptimizerSpec, spec: EngineSpec, world: World) -> None:
        self._module = module.to(world.device)
        self._world = world
        self._clip = spec.max_grad_norm
        self.loss_scale = 1.0
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters: dict[str, Tensor] = dict(self._weights)
        self._sums = GradientSums(self._weights, world)
        self._reduced: tuple[list[Tensor], float] | None = None  # the gradients of the step, and their norm
        if spec.precision != "fp32":
            self._split_masters(COMPUTE_DTYPE[spec.precision])
        decay = decays(module)
        self.optimizer = optimizer.build((master, decay[name]) for name, master in self._masters.items())

    def _split_masters(self, dtype: torch.dtype) -> None:
        """Masters from the values as they were handed in, then the module in the compute dtype."""
        self._masters = {name: p.detach().float().clone() for name, p in self._weights.items()}
        for parameter in self._module.parameters():
            if not is_quantised(parameter):  # its packed bits are no numbers
                parameter.data = parameter.data.to(dtype)

    def forward(self, fields: dict[str, Any]) -> Any:
        return self._module(**fields)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._sums.begin(last)
        (loss * self.loss_scale).backward()
        self._sums.end()

    def read(self, figures: Tensor) -> list[float]:
        """Reduce the gradients, and read their norm together with the figures: the device is waited for once."""
        gradients = self._reduced_gradients()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        *values, read_norm = torch.cat([figures.double(), norm.double().view(1)]).tolist()
        self._reduced = gradients, read_norm
        return values

    def step(self, lr: float) -> tuple[float, bool]:
        """Check, clip and update; returns the gradient norm before clipping, and whether it was applied."""
        if self._reduced is None:
            self.read(torch.empty(0, device=self._world.device))
        assert self._reduced is not None
        gradients, norm = self._reduced
        finite = math.isfinite(norm)
        if finite:
            if 0 < self._clip < norm:
                torch._foreach_mul_(gradients, self._clip / (norm + 1e-6))
            self._apply(gradients, lr)
        self.discard()
        return norm, finite

    def gradient(self, name: str) -> Tensor:
        """Of a step whose figures have been read."""
        assert self._reduced is not None
        return self._reduced[0][list(self._masters).index(name)]

    def discard(self) -> None:
        """Forget the gradients of this step."""
        self._sums.clear()
        self._reduced = None

    def _reduced_gradients(self) -> list[Tensor]:
        """The mean over the ranks, in the order of the masters; float32. No gradient counts as zero."""
        sums = self._sums.finish()
        gradients = [sums[name] for name in self._masters]
        factor = 1.0 / (self._world.size * self.loss_scale)
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return gradients

    @torch.no_grad()
    def _apply(self, gradients: list[Tensor], lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self._masters.values(), gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        for name, master in self._masters.items():
            master.grad = None
            if master is not self._weights[name]:
                self._weights[name].copy_(master)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._weights

    def value(self, name: str) -> Tensor:
        """The float32 master, in its own shape."""
        return self._masters[name].detach()

    def moment(self, name: str, key: str) -> Tensor:
        return read_moment(self.optimizer, self._masters[name], key)

    @torch.no_grad()
    def set_value(self, name: str, value: Tensor) -> None:
        self._masters[name].copy_(value)
        self._weights[name].copy_(value)

    def set_moment(self, name: str, key: str, value: Tensor) -> None:
        write_moment(self.optimizer, self._masters[name], key, value)

    def frozen_value(self, parameter: nn.Parameter) -> Tensor:
        return whole(parameter)

    def close(self) -> None:
        self._sums.release()
