"""Plain data parallelism (ZeRO 0): every rank holds everything, in float32 where it counts.

DeepSpeed's own stage 0 applies a NaN gradient in fp32, reports a gradient norm of 0, makes its bf16 masters from
rounded weights, starts AdamW at step 1, and sums bf16 gradients in bf16. So this stage is ours: float32 masters and
gradient sums, one all-reduce of the sums, the norm checked before the update. It is also the reference that the
partitioned stages are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sftdist.core.distributed import World
from sftdist.training.optimizer import OptimizerSpec, decays
from sftdist.training.zero_config import COMPUTE_DTYPE, EngineSpec

_BUCKET_ELEMENTS = 64 * 2**20


class Replicated:
    """ZeRO 0. Holds the master (float32) of every trainable parameter; in fp32 the parameter is its own master."""

    def __init__(self, module: nn.Module, optimizer: OptimizerSpec, spec: EngineSpec, world: World) -> None:
        self._module = module.to(world.device)
        self._world = world
        self._clip = spec.max_grad_norm
        self.loss_scale = 1.0
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters: dict[str, Tensor] = dict(self._weights)
        self._sums: dict[str, Tensor] = {}
        if spec.precision != "fp32":
            self._split_masters(COMPUTE_DTYPE[spec.precision])
        decay = decays(module)
        self._optimizer = optimizer.build((master, decay[name]) for name, master in self._masters.items())

    def _split_masters(self, dtype: torch.dtype) -> None:
        """Masters from the values as they were handed in, then the module in the compute dtype."""
        self._masters = {name: p.detach().float().clone() for name, p in self._weights.items()}
        for parameter in self._module.parameters():
            parameter.data = parameter.data.to(dtype)
        for name, parameter in self._weights.items():
            parameter.register_post_accumulate_grad_hook(partial(self._add_gradient, name))

    def _add_gradient(self, name: str, parameter: Tensor) -> None:
        """Sum the gradients of the step's micro-batches in float32, and free the low-precision one."""
        gradient = cast(Tensor, parameter.grad)
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient.float()
        parameter.grad = None

    def forward(self, fields: dict[str, Any]) -> Any:
        return self._module(**fields)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.loss_scale).backward()

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, check, clip and update; returns the gradient norm before clipping, and whether it was applied."""
        gradients = self._reduced_gradients()
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        finite = math.isfinite(norm)
        if finite:
            if 0 < self._clip < norm:
                torch._foreach_mul_(gradients, self._clip / (norm + 1e-6))
            self._apply(gradients, lr)
        self._sums.clear()
        self._optimizer.zero_grad()
        return norm, finite

    def _reduced_gradients(self) -> list[Tensor]:
        """The mean over the ranks, in the order of the masters; float32. No gradient counts as zero."""
        source = self._sums if self._sums else {n: p.grad for n, p in self._weights.items() if p.grad is not None}
        gradients = [source[n] if n in source else torch.zeros_like(m) for n, m in self._masters.items()]
        if self._world.size > 1:
            for bucket in _buckets(gradients, _BUCKET_ELEMENTS):
                flat = self._world.all_reduce_sum(torch.cat([gradient.flatten() for gradient in bucket]))
                parts = flat.split([gradient.numel() for gradient in bucket])
                torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])
        factor = 1.0 / (self._world.size * self.loss_scale)
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return gradients

    @torch.no_grad()
    def _apply(self, gradients: list[Tensor], lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self._masters.values(), gradients, strict=True):
            master.grad = gradient
        self._optimizer.step()
        for name, master in self._masters.items():
            if master is not self._weights[name]:
                self._weights[name].copy_(master)
                master.grad = None

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._weights

    def value(self, name: str) -> Tensor:
        """The float32 master, in its own shape."""
        return self._masters[name].detach()

    def moment(self, name: str, key: str) -> Tensor:
        return cast(Tensor, self._optimizer.state[self._masters[name]][key])

    @torch.no_grad()
    def set_value(self, name: str, value: Tensor) -> None:
        self._masters[name].copy_(value)
        self._weights[name].copy_(value)

    def set_moment(self, name: str, key: str, value: Tensor) -> None:
        self.moment(name, key).copy_(value)

    def optimizer_states(self) -> Iterator[dict[str, Any]]:
        return iter(self._optimizer.state.values())

    def frozen_value(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def close(self) -> None:
        self._sums.clear()


def _buckets(tensors: list[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors of together at most `elements`, or one larger tensor alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > elements:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
