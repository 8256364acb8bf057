"""Attention by torch's `scaled_dot_product_attention`, one document after another: any device, any dtype.

A dense block mask over the pack would be quadratic in the pack; this is quadratic in a document, and
linear in it where there is a sliding window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sftdist.model.backends.interface import Backend, Documents, LayerArguments
from sftdist.model.backends.short import short_attention

SHORT = 512  # tokens of a document; beyond it torch's kernel wins on a CPU, and its memory is linear
QUERY_BLOCK = 512  # queries of one banded block; smaller windows waste less than half of a block's keys


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, arguments: LayerArguments) -> Tensor:
    """Attention inside each document; shapes as in `Backend`."""
    if _is_plain(query, documents, arguments):
        return short_attention(query, key, value, documents.lengths, arguments.scaling)
    # split, not slices: its backward is one concatenation, a slice's is a zero-filled copy of the whole row
    rows = zip(*(tensor.split(documents.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_document(q, k, v, arguments).transpose(1, 2) for q, k, v in rows]
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _is_plain(query: Tensor, documents: Documents, arguments: LayerArguments) -> bool:
    """True where the documents are short, on a CPU, and no argument changes the result."""
    return query.device.type == "cpu" and documents.longest <= SHORT and not arguments.in_use(documents.longest)


def _document(query: Tensor, key: Tensor, value: Tensor, arguments: LayerArguments) -> Tensor:
    length, size = query.shape[2], value.shape[3]
    window = arguments.sliding_window
    if arguments.softcap is not None:
        return _softcapped(query, key, value, arguments)
    if window is not None and window < length:
        return _banded(query, key, value, arguments, window)
    if arguments.s_aux is not None:
        query, key, value = _with_sink_first(query, key, value, arguments)
        return _causal(pad(query, (0, 0, 1, 0)), key, value, arguments)[:, :, 1:, :size]
    return _causal(query, key, value, arguments)


def _causal(query: Tensor, key: Tensor, value: Tensor, arguments: LayerArguments) -> Tensor:
    return scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=arguments.dropout,
        is_causal=True,
        scale=arguments.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _with_sink_first(
    query: Tensor, key: Tensor, value: Tensor, arguments: LayerArguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the sink into a key of its own, at index 0, whose value is zero.

    Each vector gets one more dimension: 1 in the sink's key, 0 in every other key, and the head's sink
    logit (before scaling) in every query. So the product of any query with the sink's key is the sink
    logit, gradients included, and no kernel needs to know about sinks.
    """
    assert arguments.s_aux is not None
    logit = (arguments.s_aux / arguments.scaling).to(query.dtype).view(1, -1, 1, 1)
    query = torch.cat([query, logit.expand(*query.shape[:-1], 1)], dim=-1)
    sink = torch.zeros_like(key[:, :, :1]), torch.ones_like(key[:, :, :1, :1])
    key = torch.cat([torch.cat(sink, dim=-1), pad(key, (0, 1))], dim=2)
    # one size for queries, keys and values, as the fused kernels want it
    value = pad(value, (0, key.shape[-1] - value.shape[-1], 1, 0))
    return query, key, value


def _banded(query: Tensor, key: Tensor, value: Tensor, arguments: LayerArguments, window: int) -> Tensor:
    """Blocks of queries, each against the keys its window can reach."""
    length = query.shape[2]
    size = max(window, QUERY_BLOCK)
    blocks = []
    for start in range(0, length, size):
        end, first = min(start + size, length), max(0, start - window + 1)
        blocks.append(
            _masked(query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], arguments, start - first)
        )
    return torch.cat(blocks, dim=2)


def _masked(query: Tensor, key: Tensor, value: Tensor, arguments: LayerArguments, offset: int) -> Tensor:
    mask = visible(query.shape[2], key.shape[2], offset, arguments.sliding_window, query.device)
    size = value.shape[-1]
    if arguments.s_aux is not None:
        query, key, value = _with_sink_first(query, key, value, arguments)
        mask = pad(mask, (1, 0), value=True)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=arguments.dropout,
        scale=arguments.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[..., :size]


def visible(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: causal, within the window; query 0 stands at key `offset`."""
    distance = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, arguments: LayerArguments) -> Tensor:
    """Written out: no fused kernel of torch caps scores. Scores in float32; quadratic memory in the document."""
    assert arguments.softcap is not None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query.float() @ key.float().transpose(2, 3) * arguments.scaling
    scores = torch.tanh(scores / arguments.softcap) * arguments.softcap
    mask = visible(query.shape[2], key.shape[2], 0, arguments.sliding_window, query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    if arguments.s_aux is not None:
        sink = arguments.s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1).to(query.dtype)[..., : key.shape[2]]
    return torch.dropout(weights, arguments.dropout, arguments.dropout > 0.0) @ value


BACKEND = Backend(name="sdpa", supports=frozenset({"sliding_window", "softcap", "s_aux", "dropout"}), attend=attend)
