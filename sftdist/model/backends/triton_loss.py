"""Cross-entropy and its gradient in one kernel: CUDA, any float dtype. The plain path is `loss.rows_into_gradients`.

A row of logits is read twice and written once, where the plain path moves its float32 copies some ten times.
Statistics, softmax and the product with the weight are float32; what is written back is rounded once.

Liger's fused linear cross-entropy (0.8.5) is not used: it knows weights of classes, not of tokens; it reads the number
of targets from the device, and once more in the backward, so that each micro-batch would wait; and with the losses of
single tokens it makes the logits twice. Only the registry imports this file: triton comes with torch for CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sftdist.model.loss import LogitTransform

_BLOCK = 8192  # logits of a row at a time
_WARPS = 16


@triton.jit
def _transformed(logits: Any, offsets: Any, columns: tl.constexpr, scale: Any, cap: Any, capped: tl.constexpr) -> Any:
    """float32 logits of one block after scale and cap; -inf beyond the last column."""
    values = tl.load(logits + offsets, mask=offsets < columns, other=0.0).to(tl.float32) * scale
    if capped:
        values = cap * (2.0 * tl.sigmoid(2.0 * values / cap) - 1.0)  # tanh
    return tl.where(offsets < columns, values, float("-inf"))


@triton.jit
def _rows_into_gradients(
    logits: Any,
    stride: Any,
    targets: Any,
    weights: Any,
    losses: Any,
    columns: tl.constexpr,
    scale: Any,
    cap: Any,
    capped: tl.constexpr,
    weighted: tl.constexpr,
    with_gradient: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    largest = float("-inf")
    total = 0.0
    chosen = 0.0
    for start in range(0, columns, block):
        offsets = start + tl.arange(0, block)
        values = _transformed(logits, offsets, columns, scale, cap, capped)
        larger = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), axis=0)
        # taken here, not by its place: the second pass overwrites the row
        chosen += tl.sum(tl.where(offsets == target, values, 0.0), axis=0)
        largest = larger
    log_total = largest + tl.log(total)
    tl.store(losses + row, log_total - chosen)
    if with_gradient:
        weight = scale
        if weighted:
            weight = scale * tl.load(weights + row)
        for start in range(0, columns, block):
            offsets = start + tl.arange(0, block)
            values = _transformed(logits, offsets, columns, scale, cap, capped)
            gradient = tl.exp(values - log_total) - tl.where(offsets == target, 1.0, 0.0)
            if capped:
                gradient = gradient * (1.0 - (values / cap) * (values / cap))
            tl.store(logits + offsets, gradient * weight, mask=offsets < columns)


def rows_into_gradients(
    logits: Tensor, targets: Tensor, weights: Tensor | None, transform: LogitTransform, grad_enabled: bool
) -> Tensor:
    """As `loss.rows_into_gradients`: the losses [n]; the logits [n,V] become weight * (softmax - one-hot)."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _rows_into_gradients[(len(logits),)](
        logits,
        logits.stride(0),
        targets,
        losses if weights is None else weights,
        losses,
        logits.shape[1],  # one number in a run
        float(transform.scale),
        float(transform.softcap or 1.0),
        capped=transform.softcap is not None,
        weighted=weights is not None,
        with_gradient=grad_enabled,
        block=min(_BLOCK, triton.next_power_of_2(logits.shape[1])),
        num_warps=_WARPS,
    )
    return losses
