"""torch.compile, one layer at a time: the same parameters under the same names, a graph for packs of many lengths.

A layer's graph is split where its attention is, and the documents of the pack reach the attention beside the graph: as
its inputs they would be compared with those of the pack before, and each pack would be compiled anew. What is no
training runs the layers as they are: evaluation, and the checks at the start, which look into them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftdist.core.errors import ConfigError
from sftdist.model.backends.interface import Documents
from sftdist.model.load import decoder_layers
from sftdist.model.text_part import causal_lm

_BESIDE = ("max_length_q", "max_length_k")  # integers of a pack that only an attention reads; ours has the documents


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Have the layers of a model (or of a PEFT model around one) compiled at their first forward in training.

    `backend`: of torch.compile. Raises ConfigError where the model does not say what its layers are.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            f"model.compile=true: {type(causal_lm(model)).__name__} does not say what its layers are; "
            "set model.compile=false"
        )
    held, causal = _Held(), causal_lm(model)
    plain = causal.config._attn_implementation
    own = f"{plain}_compiled_{id(held):x}"  # of this model alone: another one may be loaded beside it
    ALL_ATTENTION_FUNCTIONS.register(own, held.reads(ALL_ATTENTION_FUNCTIONS[plain]))
    causal.set_attn_implementation(own)
    for layer in layers:
        # on the module itself, not around it: no name of a parameter and no class changes
        layer.forward = _forward(layer, held, backend)


class _Held:
    """The documents of the pack that a compiled layer is computing, in a forward or again in a backward."""

    def __init__(self) -> None:
        self._documents: list[Documents] = []

    def around(self, documents: Documents, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._documents.append(documents)
        try:
            return run(*args, **kwargs)
        finally:
            self._documents.pop()

    def reads(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function, outside of every graph, with the documents that its layer was called with."""

        def attend(*args: Any, documents: Documents | None = None, **kwargs: Any) -> Any:
            if documents is None and self._documents:
                documents = self._documents[-1]
            return attention(*args, documents=documents, **kwargs)

        outside: Callable[..., Any] = torch.compiler.disable(attend)
        return outside


def _forward(layer: Any, held: _Held, backend: str) -> Callable[..., Any]:
    own = type(layer).forward
    # Newer transformers recompute inside `forward`, older ones around it. The graph belongs inside of what is
    # recomputed: torch's recomputation is no part of a graph that is split.
    recomputes = "gradient_checkpointing" in own.__code__.co_names
    plain = own.__wrapped__ if recomputes else own
    compiled = torch.compile(plain, dynamic=True, backend=backend)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        step = partial(plain, layer, **kwargs)
        # a single token, as in an empty pack, would get a graph of its own
        if layer.training and hidden.shape[1] > 1 and "documents" in kwargs:
            rest = {name: value for name, value in kwargs.items() if name != "documents" and name not in _BESIDE}
            step = partial(held.around, kwargs["documents"], compiled, layer, **rest)
        if recomputes and layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(step, hidden, *args)
        return step(hidden, *args)

    return forward
