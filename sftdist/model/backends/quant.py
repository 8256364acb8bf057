"""nf4 weights through bitsandbytes (QLoRA, https://arxiv.org/abs/2305.14314): the linear layers of a model in 4 bits.

A weight is cut into blocks of 64; of each the largest magnitude is kept, and of every value the nearest of 16 levels
times that. The forward and the backward make a layer's weight whole again in the compute dtype and multiply as a plain
layer would. Only `model/quantised.py` imports this file, through the registry: the package is optional.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from sftdist.core.errors import ConfigError
from sftdist.model.backends.interface import first_line
from sftdist.model.text_part import outside_text

TYPE = "nf4"
WORST = 0.2  # of a weight's norm, that 4 bits may change
LEFT = 0.1  # of what is quantised: how much of the other matrices may stay as they are


class FrozenLinear4bit(Linear4bit):
    """A 4-bit layer that multiplies as bitsandbytes' own one does, and keeps nothing but what autograd may let go of.

    Theirs holds on to the packed weight by itself until the backward: the parts that ZeRO 3 gathers would all stay,
    also of recomputed layers. And on some CPUs it repacks its weight at the first evaluation, to multiply in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        output: Tensor = _Product.apply(x.to(self.compute_dtype), self.weight, bias, self.weight.quant_state)
        return output.to(x.dtype)


class _Product(torch.autograd.Function):
    """x W^T + b, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.state = state
        if x.device.type == "cpu":
            return nn.functional.linear(x, _values(weight, state).to(x.dtype), bias)
        product: Tensor = matmul_4bit(x, weight, quant_state=state, bias=bias)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ _values(weight, ctx.state).to(gradient.dtype), None, None, None


def _values(packed: Tensor, state: Any) -> Tensor:
    """[out, in] in the compute dtype. Read as one long row: bitsandbytes 0.50 on a CPU with AVX-512 takes the constants
    of wrong blocks where the rows are a multiple of 16 and not of 64."""
    constants = state.absmax
    if state.nested:
        constants = dequantize_blockwise(constants, state.state2) + state.offset
    row: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, constants, state.blocksize, state.quant_type, [1, state.shape.numel()], state.dtype
    )
    return row.view(state.shape)


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Run forward and backward of a small layer; '' if it works, else the reason in a line."""
    layer = nn.Linear(64, 64, bias=False, dtype=dtype)
    try:
        with torch.enable_grad():
            x = torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)
            torch.autograd.grad(_four_bits(layer, True, dtype, device, torch.uint8)(x).sum(), x)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"bitsandbytes does not run on {device}: {first_line(error)}"
    return ""


def quantise(
    model: nn.Module,
    *,
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """Put 4-bit layers in the place of the linear layers of a causal language model, but for its head; returns it.

    One layer at a time: it is rounded to `dtype` (the compute dtype; default: its own), moved to `device` (default:
    where it lies), quantised there, and its old weight is given back. Embeddings, norms, biases and the head stay.
    `double_quant`: the blocks' constants are quantised, too. `storage`: the dtype that the packed bits are kept under.
    Raises ConfigError where a good part of the model is no plain linear layer and would stay as it is.
    """
    names = _linear_layers(model)
    _refuse_what_is_left(model, names)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight
        quantised = _four_bits(layer, double_quant, dtype or weight.dtype, device or weight.device, storage)
        _check(name, weight, dequantised(quantised.weight))
        del layer, weight  # before the next one comes
        model.set_submodule(name, quantised)
    return model


def dequantised(weight: Tensor) -> Tensor:
    """[out, in] of a 4-bit weight, in the compute dtype: the very values that its layer multiplies with."""
    return _values(weight.detach(), cast(Any, weight).quant_state)


def read_alike(weight: nn.Parameter) -> bool:
    """Whether bitsandbytes' own function, which other libraries call, gives the same values."""
    return torch.equal(dequantize_4bit(weight.detach(), cast(Any, weight).quant_state), dequantised(weight))


def _four_bits(
    layer: nn.Linear, double_quant: bool, dtype: torch.dtype, device: torch.device, storage: torch.dtype
) -> FrozenLinear4bit:
    made = FrozenLinear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double_quant,
        quant_type=TYPE,
        quant_storage=storage,
        device="meta",
    )
    weight = Params4bit(
        layer.weight.detach().to(device=device, dtype=dtype),
        compress_statistics=double_quant,
        quant_type=TYPE,
        quant_storage=storage,
        module=made,
    )
    made.weight = weight.to(device)  # here it is quantised
    made.bias = layer.bias
    made.train(layer.training)
    return made


@torch.no_grad()
def _check(name: str, weight: Tensor, values: Tensor) -> None:
    """nf4 keeps a normal weight to 9 % of its norm, and none worse than the widest gap between two levels allows."""
    before = weight.to(values.device).float()
    error = float((values.float() - before).norm() / before.norm().clamp(min=1e-30))
    if not error <= WORST:
        raise ConfigError(
            f"tune.method=qlora: {name} {list(weight.shape)} comes back from bitsandbytes with an error of {error:.0%} "
            f"on {values.device}, required at most {WORST:.0%}: it cannot be trained in 4 bits here; set "
            "tune.method=lora"
        )


def _linear_layers(model: nn.Module) -> list[str]:
    """Those that text passes through: a vision tower stays as it is."""
    head, outside = cast(Any, model).get_output_embeddings(), outside_text(cast(Any, model))
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    return [name for name, layer in layers if layer is not head and f"{name}.weight" not in outside]


def _refuse_what_is_left(model: nn.Module, names: list[str]) -> None:
    """Fused experts are parameters and GPT-2's layers a class of their own: bitsandbytes has nothing for either."""
    linear = {name: cast(nn.Linear, model.get_submodule(name)).weight for name in names}
    known = {id(weight) for weight in (*linear.values(), *outside_text(cast(Any, model)).values())}
    tables = [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]
    tables.append(cast(Any, model).get_output_embeddings())
    whole = {id(parameter) for table in tables for parameter in table.parameters()}
    left = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in known | whole
    }
    quantised = sum(weight.numel() for weight in linear.values())
    staying = sum(parameter.numel() for parameter in left.values())
    if staying > LEFT * quantised:
        largest = max(left, key=lambda name: left[name].numel())
        raise ConfigError(
            f"tune.method=qlora: given a model with {staying:,} parameters, such as {largest} "
            f"{list(left[largest].shape)}, outside of plain linear layers, which hold {quantised:,}; required that "
            "bitsandbytes can hold the model in 4 bits, and it knows linear layers only: set tune.method=lora"
        )
