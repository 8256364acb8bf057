"""Attention by PyTorch's own variable-length flash kernels: CUDA, bf16 or fp16, no extra package."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from sftdist.model.backends.interface import Backend, Documents, LayerArguments

# torch 2.11's kernel takes fewer key heads untold and has no such argument
TELLS_OF_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, arguments: LayerArguments) -> Tensor:
    """Attention inside each document; shapes as in `Backend`."""
    window = arguments.sliding_window
    # the window's left size counts the keys before the query, transformers' window the query too
    left = -1 if window is None or window >= documents.longest else window - 1
    groups: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if TELLS_OF_GROUPS else {}
    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.cu_seqlens,
        documents.cu_seqlens,
        documents.longest,
        documents.longest,
        scale=arguments.scaling,
        window_size=(left, 0),
        **groups,
    )
    assert isinstance(output, Tensor)  # a pair only with return_aux
    return output.unsqueeze(0)


BACKEND = Backend(name="torch_varlen", supports=frozenset({"sliding_window"}), attend=attend)
