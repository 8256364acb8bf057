"""4-bit weights as the rest of the program sees them: made when asked for, whole values wherever one is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sftdist.core.errors import ConfigError
from sftdist.model.backends.registry import Quantisation, open_quantisation

BASE_QUANTISATION = "base_quantization.json"  # beside an adapter: what transformers' BitsAndBytesConfig takes


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """A line that says why no weight can lie in 4 bits there; '' where it can."""
    opened = open_quantisation()
    return opened if isinstance(opened, str) else opened.why_not(device, dtype)


def require_quantisation(device: torch.device, dtype: torch.dtype) -> Quantisation:
    """bitsandbytes, seen to run there. Raises ConfigError where it is absent or does not run."""
    if problem := why_not(device, dtype):
        raise ConfigError(
            f"tune.method=qlora: {problem}; required is bitsandbytes: pip install 'sftdist[quant]', or set "
            "tune.method=lora"
        )
    return _door()


def quantise(
    model: PreTrainedModel, *, double_quant: bool, dtype: torch.dtype, device: torch.device, floating: bool = False
) -> None:
    """Hold the linear layers of a model in 4 bits on `device`, rounded to the compute dtype `dtype` before.

    `floating`: under that dtype's name, as what partitions weights of one dtype needs them. Raises ConfigError where
    bitsandbytes is absent or does not run, or the model is not made of linear layers.
    """
    opened, storage = require_quantisation(device, dtype), dtype if floating else torch.uint8
    opened.quantise(model, double_quant=double_quant, dtype=dtype, device=device, storage=storage)


def is_quantised(parameter: Tensor) -> bool:
    return _state(parameter) is not None


def whole(parameter: Tensor) -> Tensor:
    """The float32 value of a parameter, [out, in] of a 4-bit one: what the forward computes with."""
    return _door().dequantised(parameter).float() if is_quantised(parameter) else parameter.detach().float()


def whole_shape(parameter: Tensor) -> torch.Size:
    """Also where a parameter lies in 4 bits, or where ZeRO 3 has left an empty tensor in its place."""
    state = _state(parameter)
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape)


def quantisation_of(model: nn.Module) -> dict[str, Any] | None:
    """How the base of an adapter lies in 4 bits, as the arguments of transformers' BitsAndBytesConfig."""
    state = next((_state(p) for p in model.parameters() if is_quantised(p)), None)
    if state is None:
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": state.quant_type,
        "bnb_4bit_use_double_quant": state.nested,
        "bnb_4bit_compute_dtype": str(state.dtype).removeprefix("torch."),
    }


def quantise_as(model: PreTrainedModel, described: Mapping[str, Any]) -> None:
    """What `quantisation_of` described, where the model lies."""
    quantise(
        model,
        double_quant=described["bnb_4bit_use_double_quant"],
        dtype=getattr(torch, described["bnb_4bit_compute_dtype"]),
        device=model.device,
    )


def require_read_alike(model: nn.Module) -> None:
    """For what reads 4-bit weights by itself. Raises ConfigError where bitsandbytes gives it other values."""
    for name, parameter in model.named_parameters():
        if is_quantised(parameter) and not _door().read_alike(parameter):
            raise ConfigError(
                f"tune.dora=true with tune.method=qlora: PEFT would read other values of {name} "
                f"{list(whole_shape(parameter))} than it holds (bitsandbytes on {parameter.device} wants rows of a "
                "multiple of 64); set tune.dora=false"
            )


def _state(parameter: Tensor) -> Any:
    return getattr(parameter, "quant_state", None)  # of bitsandbytes' own class


def _door() -> Quantisation:
    opened = open_quantisation()
    assert not isinstance(opened, str)  # it was opened before, or has made the weight
    return opened
