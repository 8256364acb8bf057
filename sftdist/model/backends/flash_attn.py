"""Attention by the flash-attn package (Dao et al., https://arxiv.org/abs/2307.08691): CUDA, bf16 or fp16.

Only the registry imports this file: the package is optional, and a build for another torch fails at import.
"""

from __future__ import annotations

from flash_attn import flash_attn_varlen_func
from torch import Tensor

from sftdist.model.backends.interface import Backend, Documents, LayerArguments


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, arguments: LayerArguments) -> Tensor:
    """Attention inside each document; shapes as in `Backend`."""
    window = arguments.sliding_window
    left = -1 if window is None or window >= documents.longest else window - 1
    output: Tensor = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens_q=documents.cu_seqlens,
        cu_seqlens_k=documents.cu_seqlens,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        dropout_p=arguments.dropout,
        softmax_scale=arguments.scaling,
        causal=True,
        window_size=(left, 0),
        softcap=arguments.softcap or 0.0,
    )
    return output.unsqueeze(0)


BACKEND = Backend(name="flash_attn", supports=frozenset({"sliding_window", "softcap", "dropout"}), attend=attend)
