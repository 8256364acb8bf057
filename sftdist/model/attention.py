"""Attention of packed rows, bound through transformers' public attention registry.

A model loaded with `attn_implementation=implementation(name)` calls one of our functions in every layer,
with the documents of the row among its keyword arguments (`Documents.model_arguments`). There is no
mask: what a token sees follows from the documents and the layer's own arguments.
Whatever a layer passes that the backend does not honour is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftdist.core.errors import ConfigError
from sftdist.model.backends.interface import Backend, Documents, LayerArguments
from sftdist.model.backends.registry import PREFERENCE, open_backend, runs_on

# No name may contain "sdpa" or "flash": transformers takes those for its own implementations.
_IMPLEMENTATIONS = {"sdpa": "sftdist_per_document", "torch_varlen": "sftdist_varlen", "flash_attn": "sftdist_fa"}

# What models pass to every attention function and what carries nothing that `documents` does not say.
_CARRIED_BY_DOCUMENTS = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}

_SINK_MODEL_TYPES = {"gpt_oss"}


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that will run, and why each faster one will not."""

    name: str
    rejected: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(self.rejected)})" if self.rejected else self.name


def implementation(name: str) -> str:
    """The `attn_implementation` under which a backend stands in transformers' registry."""
    return _IMPLEMENTATIONS[name]


def register(name: str) -> str:
    """Put a backend into transformers' registry and return its `attn_implementation`. ConfigError if it cannot be.

    No mask function goes with it: what a token sees follows from the documents, and for an attention without one
    transformers makes no mask at all. With one, it would ask the device first whether the positions are packed.
    """
    backend = open_backend(name)
    if isinstance(backend, str):
        raise ConfigError(f"model.attention={name}: {backend}; set model.attention=auto")
    ALL_ATTENTION_FUNCTIONS.register(implementation(name), partial(attention_forward, backend))
    return implementation(name)


def attention_forward(
    backend: Backend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: query [1,H,T,D], key and value [1,K,T,D] -> ([1,T,H,D], None)."""
    if documents is None:
        raise ConfigError(
            f"{type(module).__name__} did not receive the documents of the pack: this model does not hand extra "
            "arguments on to its attention, and cannot be trained with this attention"
        )
    if attention_mask is not None or query.shape[0] != 1:
        raise ConfigError(
            f"{type(module).__name__} was given an attention mask or {query.shape[0]} rows; "
            "a packed row is one row without a mask"
        )
    arguments = layer_arguments(module, query.shape[-1], kwargs)
    return backend(query, key, value, documents, arguments), None


def layer_arguments(module: nn.Module, head_dim: int, given: dict[str, Any]) -> LayerArguments:
    """Sort a layer's keyword arguments into those we know; ConfigError for any other that is set."""
    rest = dict(given)
    scaling = rest.pop("scaling", None)
    causal = rest.pop("is_causal", None)
    arguments = LayerArguments(
        scaling=head_dim**-0.5 if scaling is None else float(scaling),
        sliding_window=rest.pop("sliding_window", None),
        softcap=rest.pop("softcap", None),
        s_aux=rest.pop("s_aux", None),
        dropout=rest.pop("dropout", 0.0),
    )
    is_set = {name for name, value in rest.items() if value is not None and value is not False}
    unknown = sorted(is_set - _CARRIED_BY_DOCUMENTS)
    if causal is False or (causal is None and getattr(module, "is_causal", True) is False):
        unknown.append("is_causal=False")
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which no backend here supports: "
            "this model cannot be trained exactly"
        )
    return arguments


def needs(config: PreTrainedConfig) -> set[str]:
    """The layer arguments that a model's config announces, for choosing a backend before the model is loaded."""
    text = config.get_text_config(decoder=True)
    announced = {
        "sliding_window": _setting(text, "sliding_window") is not None,
        "softcap": _setting(text, "attn_logit_softcapping") is not None,
        "s_aux": text.model_type in _SINK_MODEL_TYPES,
        "dropout": (_setting(text, "attention_dropout") or 0.0) > 0.0,
    }
    return {name for name, is_needed in announced.items() if is_needed}


def choose(name: str, device: torch.device, dtype: torch.dtype, config: PreTrainedConfig) -> Choice:
    """Choose a backend that really runs on the device for this model.

    `auto` takes the first that works of flash_attn, torch_varlen, sdpa; a name takes that one or raises
    ConfigError with the reason.
    """
    rejected: list[str] = []
    for candidate in PREFERENCE if name == "auto" else (name,):
        reason = _why_not(candidate, device, dtype, config)
        if not reason:
            return Choice(candidate, tuple(rejected))
        rejected.append(reason)
    raise ConfigError(f"model.attention={name}: {'; '.join(rejected)}; set model.attention=auto")


def _why_not(name: str, device: torch.device, dtype: torch.dtype, config: PreTrainedConfig) -> str:
    backend = open_backend(name)
    if isinstance(backend, str):
        return backend
    missing = needs(config) - backend.supports
    if missing:
        return f"{name} does not support {', '.join(sorted(missing))}, which {config.model_type} needs"
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_dim = _setting(text, "head_dim") or text.hidden_size // heads
    return runs_on(backend, device, dtype, head_dim, heads, _setting(text, "num_key_value_heads") or heads)


def _setting(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config, name, None)  # a foreign class with fields that differ by architecture


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
