"""What each layer of a model gives and gets back: norms by hooks, and the first value that is not finite.

For a look at few steps: every module is listened to, which costs a training step about twice its time.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from sftdist.model.load import decoder_layers
from sftdist.model.loss import LossModel
from sftdist.model.text_part import causal_lm

HEAD = "head and loss"
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class LayerNorms:
    """Root of the sum of squares over this rank's packs: of a layer's output, and of the loss's gradient by it, which
    carries the factor `scale` of the pass. Infinite or NaN where one value was; `gradient` is None where none came."""

    name: str
    activation: float
    gradient: float | None


@dataclass(frozen=True)
class Event:
    """A value that is not finite: in which pack of this rank (from 0), in which pass, in the output of which module, or
    in the gradient of which; `positions`: int64 [n] of its tokens in the pack, None where it has none."""

    pack: int
    phase: str
    name: str
    positions: Tensor | None


class LayerWatch:
    """A context around forward and backward passes of a loss module, which it leaves as it was.

    `first`: the first value that is not finite, in the order in which modules end; `norms`: per layer. Compiled layers
    run as they are written inside, so that their parts can be heard.
    """

    def __init__(self, module: LossModel) -> None:
        self.first: Event | None = None
        self._module = module
        self._names = {part: plain_name(name) for name, part in module.named_modules() if name}
        causal = causal_lm(module.model)
        shown = (causal.get_input_embeddings(), *decoder_layers(module.model), module.head_loss)
        self._layers = {self._names[part]: LayerNorms(self._names[part], 0.0, None) for part in shown}
        self._squares: dict[tuple[str, str], Tensor] = {}
        self._pack = -1
        self._seen: set[nn.Module] = set()
        self._around = ExitStack()

    def __enter__(self) -> Self:
        keep = self._around.callback
        keep(self._module.register_forward_pre_hook(self._begin).remove)
        for part, name in self._names.items():
            keep(part.register_forward_hook(partial(self._forward, name)).remove)
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                keep(parameter.register_hook(partial(self._gradient, f"{plain_name(name)} (the weight)")).remove)
        self._around.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._around.close()

    def norms(self) -> list[LayerNorms]:
        """Embeddings, each layer, head and loss; read from the device."""
        return [LayerNorms(name, self._root(FORWARD, name) or 0.0, self._root(BACKWARD, name)) for name in self._layers]

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._pack += 1
        self._seen.clear()

    def _forward(self, name: str, part: nn.Module, inputs: Any, output: Any) -> None:
        value = _tensor(output)
        if value is None or part in self._seen:  # a layer that is recomputed in the backward comes again
            return
        self._seen.add(part)
        self._note(FORWARD, name, value)
        if value.requires_grad:
            value.register_hook(partial(self._gradient, name))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self._note(BACKWARD, name, gradient)

    @torch.no_grad()
    def _note(self, phase: str, name: str, value: Tensor) -> None:
        square = torch.linalg.vector_norm(value.detach(), dtype=torch.float64) ** 2
        if name in self._layers:
            self._squares[phase, name] = self._squares.get((phase, name), 0.0) + square
        if self.first is None and not bool(square.isfinite()):
            self.first = Event(self._pack, phase, name, _positions(value))

    def _root(self, phase: str, name: str) -> float | None:
        square = self._squares.get((phase, name))
        return None if square is None else math.sqrt(square.item())


def plain_name(name: str) -> str:
    """As in the model itself: without the loss module and PEFT around it."""
    return HEAD if name == "head_loss" else name.removeprefix("model.").removeprefix("base_model.model.")


def _tensor(output: Any) -> Tensor | None:
    """The first tensor of numbers that a module gives."""
    parts = output if isinstance(output, tuple | list) else (output,)
    return next((part for part in parts if isinstance(part, Tensor) and part.is_floating_point()), None)


def _positions(value: Tensor) -> Tensor | None:
    """The tokens of hidden states [1, T, ...] that hold such a value."""
    if value.dim() < 3 or len(value) != 1:
        return None
    return (~value[0].isfinite()).flatten(1).any(1).nonzero().squeeze(1)
