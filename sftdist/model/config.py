"""A model's config, without any of its code: what a plan needs to know of it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from sftdist.core.errors import ConfigError


def load_config(path: str | None, revision: str | None, shape: dict[str, Any] | None) -> PreTrainedConfig:
    """The model's config from its folder or Hub name, or made from a mapping that names its `model_type`."""
    if path is not None:
        return _config_of(path, revision)
    if shape is not None:
        return _config_from(shape)
    raise ConfigError("model.path and model.shape are both empty: give one of them")


def _config_from(shape: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**shape)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.shape: given {shape}, which transformers does not take ({reason}); required is a config of a model "
            "that it knows, model_type included"
        ) from error


def _config_of(path: str, revision: str | None) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path={path}: no config.json could be loaded ({reason}); give the folder or Hub name of a causal "
            "language model"
        ) from error
