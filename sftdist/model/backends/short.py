"""Plain causal attention over short documents on a CPU, written out in matrix products.

torch's flash kernel for CPUs reaches about a tenth of the matrix rate on documents of a few hundred
tokens. Here the scores of one document are one batched product. Scores and softmax are float32 in rows
of any dtype; the other products run in the dtype of the row, as they do inside flash kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def short_attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float) -> Tensor:
    """[1,H,T,D], [1,K,T,D], [1,K,T,E] -> [1,T,H,E]. Memory is quadratic in the longest document."""
    output: Tensor = _ShortAttention.apply(query[0], key[0], value[0], lengths, scaling)
    return output.unsqueeze(0)


class _ShortAttention(torch.autograd.Function):
    """One node for all documents of a row: no splits, no concatenations, no repeated keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float
    ) -> Tensor:
        heads, tokens, _ = query.shape
        output = query.new_empty(tokens, heads, value.shape[2])
        future = _future(max(lengths))
        kept = []
        for span in _spans(lengths):
            q, k = (_document(tensor, key.shape[0], span, torch.float32) for tensor in (query, key))
            probabilities = _probabilities(q, k, future, scaling).to(query.dtype)
            _store(output, torch.bmm(probabilities, value[:, span]), span)
            kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        gradient = grad_outputs[0].transpose(0, 1)
        # [T,H,D] in memory, as the projections that wait for them are
        grads = [t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value)]
        for span, probabilities in zip(_spans(ctx.lengths), kept, strict=True):
            q, g = (_document(tensor, key.shape[0], span, query.dtype) for tensor in (query, gradient))
            k, v = key[:, span], value[:, span]
            _store(grads[2], torch.bmm(probabilities.transpose(1, 2), g), span)
            wanted = torch.bmm(g, v.transpose(1, 2))
            scores = torch.ops.aten._softmax_backward_data(wanted, probabilities, -1, query.dtype)
            _store(grads[0], _product(scores, k, ctx.scaling), span)
            _store(grads[1], _product(scores.transpose(1, 2), q, ctx.scaling), span)
        query_grad, key_grad, value_grad = (grad.transpose(0, 1) for grad in grads)
        return query_grad, key_grad, value_grad, None, None


def _spans(lengths: tuple[int, ...]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _document(tensor: Tensor, kv_heads: int, span: slice, dtype: torch.dtype) -> Tensor:
    """[K, G*L, D]: the query heads that share a key head lie one after another, as one taller matrix."""
    part = tensor[:, span]
    return torch.empty(part.shape, dtype=dtype).copy_(part).view(kv_heads, -1, part.shape[2])


def _store(target: Tensor, source: Tensor, span: slice) -> None:
    """Write [K, G*L, D] into the rows of [T,H,D]."""
    heads = target.shape[1]
    target[span] = source.view(heads, -1, source.shape[2]).transpose(0, 1)


def _probabilities(query: Tensor, key: Tensor, future: Tensor, scaling: float) -> Tensor:
    length = key.shape[1]
    scores = _product(query, key.transpose(1, 2), scaling)
    scores.view(-1, length, length).add_(future[:length, :length])
    return torch.softmax(scores, dim=-1)


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Batched matrix product times a number, scaled before it is rounded to the dtype."""
    empty = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(empty, left, right, beta=0, alpha=scaling, out=empty)


def _future(length: int) -> Tensor:
    """[L,L]: 0 where a query may look, -inf above the diagonal."""
    return torch.full((length, length), float("-inf")).triu_(1)
