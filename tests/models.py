"""Tiny random models of many architectures, built from their transformers config classes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from sftdist.model.load import load_model

VOCABULARY = 128
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that attention matters in two layers
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "full_attention"]

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "layer_types": _ALTERNATING,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "layer_types": _ALTERNATING,
    },
    "phi3": {"model_type": "phi3", "sliding_window": WINDOW},
    "gpt2": {  # learned positions; rotary ones see differences only
        "model_type": "gpt2",
        "n_inner": 48,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "initializer_range": 0.1,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": _ALTERNATING,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
# Layers of short convolutions and recurrences beside some with attention.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 16}
_DELTA = {
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "layer_types": ["linear_attention", "full_attention"],
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **{"model_type": "qwen3_next", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, **_DELTA},
    },
    "qwen3_5": {"model_type": "qwen3_5_text", "head_dim": 8, **_DELTA},
    "olmo_hybrid": {"model_type": "olmo_hybrid", **_DELTA},
    "falcon_h1": {"model_type": "falcon_h1", "head_dim": 8, "mamba_d_ssm": 64, **_MAMBA},
    "bamba": {"model_type": "bamba", "attn_layer_indices": [1], **_MAMBA},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "jamba": {
        **{"model_type": "jamba", "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 16},
        **{"expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4, "num_experts_per_tok": 2},
    },
}
MIXTURES_OF_EXPERTS = {"gpt_oss", "mixtral", "qwen3_moe"}
WINDOWED = {"mistral", "gemma2", "gemma3", "phi3", "gpt_oss"}


def shape(family: str, **changes: Any) -> dict[str, Any]:
    """The config of a tiny model as the mapping that `model.shape` takes."""
    return {**_COMMON, **{**SHAPES, **HYBRIDS}[family], **changes}


def tiny_model(family: str, *, seed: int = 0, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A tiny random model in float32, in evaluation mode. Sinks are made large, or they would not matter."""
    config = AutoConfig.for_model(**shape(family, **changes))
    model = load_model(config=config, path=None, init="random", seed=seed, attention=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(mean=1.0)
    return model.eval()
