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
        return AutoConfig.for_model(**shape)
    raise ConfigError("model.path and model.shape are both empty: give one of them")


def _config_of(path: str, revision: str | None) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.path={path}: no config.json could be loaded ({reason}); give the folder or Hub name of a causal "
            "language model"
        ) from error
