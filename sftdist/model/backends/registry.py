"""The one door to the backends: opens each file by name and says in words why one cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sftdist.model.backends.interface import Backend, Documents, LayerArguments, first_line

PREFERENCE = ("flash_attn", "torch_varlen", "sdpa")  # fastest first


class LayerKernels(Protocol):
    """Fused kernels that take the place of a model's own layers."""

    def why_not(self, config: PreTrainedConfig, device: torch.device) -> str: ...

    def use(self, model: PreTrainedModel) -> None: ...


class Quantisation(Protocol):
    """Frozen weights in 4 bits."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str: ...

    def quantise(
        self,
        model: nn.Module,
        *,
        double_quant: bool = ...,
        dtype: torch.dtype | None = ...,
        device: torch.device | None = ...,
        storage: torch.dtype = ...,
    ) -> nn.Module: ...

    def dequantised(self, weight: Tensor) -> Tensor: ...

    def read_alike(self, weight: nn.Parameter) -> bool: ...


class LossKernel(Protocol):
    """A fused kernel for the chunks of the loss; `rows_into_gradients` is a `loss.RowLosses`."""

    rows_into_gradients: Callable[..., Tensor]

    def why_not(self, device: torch.device) -> str: ...


def open_backend(name: str) -> Backend | str:
    """The backend, or one line that says why it cannot be imported (absent, or built for another torch)."""
    module = _open(name, package=name)
    return module if isinstance(module, str) else cast(Backend, module.BACKEND)


def open_layer_kernels() -> LayerKernels | str:
    """Liger's kernels for the layers of a model, or one line that says why they cannot be imported."""
    return cast("LayerKernels | str", _open("liger", package="liger_kernel"))


def open_loss_kernel() -> LossKernel | str:
    """The fused loss kernel, or one line that says why it cannot be imported."""
    return cast("LossKernel | str", _open("triton_loss", package="triton"))


def open_quantisation() -> Quantisation | str:
    """bitsandbytes' 4-bit layers, or one line that says why they cannot be imported."""
    return cast("Quantisation | str", _open("quant", package="bitsandbytes"))


def _open(name: str, package: str) -> ModuleType | str:
    try:
        return import_module(f"sftdist.model.backends.{name}")
    except ModuleNotFoundError as error:
        return f"{package} is not installed" if error.name == package else _broken(package, error)
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        return _broken(package, error)


def runs_on(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int
) -> str:
    """Run forward and backward of two small documents; '' if it works, else the reason."""
    query, key, value = (
        torch.ones((1, count, 6, head_dim), device=device, dtype=dtype, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    try:
        with torch.enable_grad():
            output = backend(query, key, value, Documents.of_lengths([4, 2], device), LayerArguments(scaling=1.0))
            torch.autograd.grad(output.sum(), (query, key, value))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        # TypeError: another release's argument. torch goes on with a list of all that it could run on
        return f"{backend.name} does not run on {device}: {first_line(error).partition('. ')[0]}"
    return ""


def _broken(name: str, error: Exception) -> str:
    return f"{name} cannot be imported: {first_line(error)} (sftdist doctor says what would fit)"
