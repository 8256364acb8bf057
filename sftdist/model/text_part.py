"""The part of a model that text passes through: all of most models, and of a multimodal one its decoder and head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from sftdist.core.errors import ConfigError


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also where PEFT has wrapped it."""
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    return cast(PreTrainedModel, inner)


def decoder_of(causal: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that ends before the head. ConfigError where it cannot be told apart."""
    decoder = causal.get_decoder()
    if decoder is causal:  # a few classes name a base that they do not have
        decoder = dict(causal.named_children()).get("model", causal)
    if decoder is causal or causal.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(causal).__name__} does not say which part is its decoder and which its head: "
            "choose a causal language model with both"
        )
    return cast(nn.Module, decoder)


def outside_text(causal: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters that no text passes through, by name: a vision tower and its projector."""
    parts = (decoder_of(causal), causal.get_output_embeddings())
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: parameter for name, parameter in causal.named_parameters() if id(parameter) not in inside}


def freeze_outside_text(causal: PreTrainedModel) -> None:
    """They get no gradient from text, and weight decay alone must not move them."""
    for parameter in outside_text(causal).values():
        parameter.requires_grad_(False)


def parts_named(names: Iterable[str]) -> str:
    """The modules that hold these parameters, as one would name them: model.vision_tower, ..."""
    return ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))


def convolutions(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Weights of the short convolutions of recurrent layers, each with the layer that hands it to a function: the
    convolution itself is never called, so nothing that waits for its call would make its weights whole."""
    for owner in decoder_of(causal_lm(model)).modules():
        for child in owner.children():
            if isinstance(child, nn.Conv1d):
                yield from ((owner, parameter) for parameter in child.parameters(recurse=False))


def decoder_prefix(causal: PreTrainedModel) -> str:
    """The decoder's name in the model, with a dot behind it."""
    decoder = decoder_of(causal)
    return next(f"{name}." for name, module in causal.named_modules() if module is decoder)
