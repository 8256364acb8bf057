"""What a plan knows of the model: its config and what a document costs. Neither weights nor the engine are loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig

from sftdist.core.settings import Method, TrainConfig
from sftdist.data.packing import CostModel
from sftdist.model import cost
from sftdist.model.config import load_config


def planned_config(cfg: TrainConfig, tokens: int) -> PreTrainedConfig:
    """The config to plan with: `model.shape` where it is given, so that a plan needs no weights and no network."""
    if cfg.model.shape is None:
        return load_config(cfg.model.path, cfg.model.revision, None)
    return load_config(None, None, {**cfg.model.shape, "vocab_size": max(cfg.model.shape.get("vocab_size", 0), tokens)})


def cost_model(config: PreTrainedConfig, method: Method, supervised_share: float) -> CostModel:
    """FLOPs of training on a document: the head counts at the supervised positions only."""
    mapping = config.to_dict()
    dense, attention = cost.train_factors(method.value)
    per_token = dense * (cost.dense_flops(mapping) + supervised_share * cost.head_flops(mapping))
    terms = tuple((attention * flops, window) for flops, window in cost.attention_terms(mapping))
    return CostModel(dense=per_token, attention=terms)
