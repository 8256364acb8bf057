"""AdamW with 8 bits for each number of its state: `optimizer.name=sftdist.examples.adam8bit:Adam8bit`.

As in Dettmers et al. 2022 (arXiv:2110.02861) blocks of 256 numbers share a scale and the steps between codes grow with
the number. Written in plain torch, so that it runs wherever torch does and can be read; a quarter of AdamW's state.

It is also the example of an optimizer whose state is in a form of its own: `moments`, `read_moment` and `write_moment`
give it as float32 tensors of the parameter's shape, so that a checkpoint holds them and a resumed run is bit-equal.
Blocks that ranks cut elsewhere would have other scales, so it needs whole parameters: `zero.stage=0`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256


class Form(NamedTuple):
    """How the numbers of a moment become codes: |code| is `most * (|number| / scale) ** (1 / power)`."""

    most: int
    power: int
    dtype: torch.dtype


FORMS = {"exp_avg": Form(127, 3, torch.int8), "exp_avg_sq": Form(255, 4, torch.uint8)}


class Adam8bit(Optimizer):
    """AdamW whose two moments are held as 8-bit codes, rounded at random, the same at random on every rank."""

    moments = tuple(FORMS)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            for name in FORMS:
                self.write_moment(parameter, name, torch.zeros_like(parameter))
        state["step"] += 1
        (beta1, beta2), count = group["betas"], state["step"]
        first = self.read_moment(parameter, "exp_avg").lerp_(gradient, 1 - beta1)
        second = self.read_moment(parameter, "exp_avg_sq").mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = (second / (1 - beta2**count)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**count))
        # Rounded to the nearest code, a moment that changes by less than half a step would never change. What is drawn
        # depends on the step alone: not on the rank, and not on the random state of the training.
        dice = torch.Generator(parameter.device).manual_seed(1_000_003 * count + number)
        self._encode(parameter, "exp_avg", first, dice)
        self._encode(parameter, "exp_avg_sq", second, dice)

    def read_moment(self, parameter: Tensor, name: str) -> Tensor:
        """The moment as float32 of the parameter's shape."""
        codes, scale = (self.state[parameter][f"{name}_{part}"] for part in ("codes", "scale"))
        part = codes.float() / FORMS[name].most
        numbers = part.abs().pow(FORMS[name].power) * part.sign() * scale
        return numbers.flatten()[: parameter.numel()].view(parameter.shape)

    def write_moment(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Put it back: what `read_moment` gave becomes the same codes."""
        self._encode(parameter, name, value, None)

    def _encode(self, parameter: Tensor, name: str, value: Tensor, dice: torch.Generator | None) -> None:
        """The largest number of a block is its scale, and exact: so is every code that is read and written again."""
        form = FORMS[name]
        flat = value.float().flatten()
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        exact = (blocks.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)).pow(1 / form.power) * form.most
        if dice is None:
            codes = exact.round()
        else:
            codes = (exact + torch.rand(exact.shape, generator=dice, device=exact.device)).floor()
            codes = torch.where(exact >= form.most, form.most, codes)
        # A second moment of 0 beside a first one that is not would be a step without a bound.
        codes = codes.clamp(1 if form.dtype == torch.uint8 else 0, form.most) * (blocks != 0)
        state = self.state[parameter]
        state[f"{name}_codes"] = (codes * blocks.sign()).to(form.dtype)
        state[f"{name}_scale"] = scale
