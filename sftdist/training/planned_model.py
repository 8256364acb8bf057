"""What a plan knows of the model: its config and what a document costs. Neither weights nor the engine are loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig

from sftdist.core.settings import Method, TrainConfig, TuneSettings
from sftdist.data.packing import CostModel
from sftdist.model import cost
from sftdist.model.config import load_config


def planned_config(cfg: TrainConfig, tokens: int) -> PreTrainedConfig:
    """The config to plan with: `model.shape` where it is given, so that a plan needs no weights and no network."""
    if cfg.model.shape is None:
        return load_config(cfg.model.path, cfg.model.revision, None)
    return load_config(None, None, {**cfg.model.shape, "vocab_size": max(cfg.model.shape.get("vocab_size", 0), tokens)})


def cost_model(config: PreTrainedConfig, tune: TuneSettings, supervised_share: float) -> CostModel:
    """FLOPs of training on a document: the head counts at the supervised positions only, of which plans know the share
    and steps the number."""
    mapping, method = config.to_dict(), tune.method.value
    dense, attention = cost.train_factors(method)
    tokens = cost.token_flops(mapping, method, 0 if tune.method == Method.full else tune.r)
    terms = tuple((attention * flops, window) for flops, window in cost.attention_terms(mapping))
    return CostModel(tokens, terms, head=dense * cost.head_flops(mapping), supervised=supervised_share)
