"""Cross-entropy and its gradient in one kernel: CUDA, any float dtype. The plain path is `loss.rows_into_gradients`.

A row of logits is read twice and written once, where the plain path moves its float32 copies some ten times.
Statistics, softmax and the product with the weight are float32; what is written back is rounded once.

Liger's fused linear cross-entropy (0.8.5) is not used: it knows weights of classes, not of tokens; it reads the number
of targets from the device, and once more in the backward, so that each micro-batch would wait; and with the losses of
single tokens it makes the logits twice. Only the registry imports this file: triton comes with torch for CUDA only.
"""

from __future__ import annotations

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from sftdist.model.backends.interface import first_line
from sftdist.model.loss import IDENTITY, LogitTransform

# A kernel that cannot be built: no compiler, no headers of Python, a GPU that this triton does not know.
NOT_BUILT = (RuntimeError, OSError, subprocess.SubprocessError, TritonError)
_BLOCK = 8192  # logits of a row at a time
_WARPS = 16


# Triton reads annotations as names of the program: a kernel has none but its own.
@triton.jit
def _transformed(logits, offsets, columns: tl.constexpr, scale, cap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 logits of one block after scale and cap; -inf beyond the last column."""
    values = tl.load(logits + offsets, mask=offsets < columns, other=0.0).to(tl.float32) * scale
    if capped:
        values = cap * (2.0 * tl.sigmoid(2.0 * values / cap) - 1.0)  # tanh
    return tl.where(offsets < columns, values, float("-inf"))


@triton.jit
def _rows_into_gradients(  # type: ignore[no-untyped-def]
    logits,
    stride,
    targets,
    weights,
    losses,
    columns: tl.constexpr,
    scale,
    cap,
    capped: tl.constexpr,
    weighted: tl.constexpr,
    with_gradient: tl.constexpr,
    block: tl.constexpr,
):
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


def why_not(device: torch.device) -> str:
    """Run the kernel on two rows; '' if it works, else the reason in a line."""
    try:
        logits, targets = torch.ones(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        rows_into_gradients(logits, targets, None, IDENTITY, True)
    except NOT_BUILT as error:
        return f"the fused loss does not run on {device}: {first_line(error)}"
    return ""
