"""The one door to the attention backends: opens each file by name and says in words why one cannot be used."""

from __future__ import annotations

from importlib import import_module

import torch

from sftdist.model.backends.interface import Backend, Documents, LayerArguments

PREFERENCE = ("flash_attn", "torch_varlen", "sdpa")  # fastest first


def open_backend(name: str) -> Backend | str:
    """The backend, or one line that says why it cannot be imported (absent, or built for another torch)."""
    try:
        module = import_module(f"sftdist.model.backends.{name}")
    except ModuleNotFoundError as error:
        return f"{name} is not installed" if error.name == name else _broken(name, error)
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        return _broken(name, error)
    backend: Backend = module.BACKEND
    return backend


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
    except (RuntimeError, ValueError, NotImplementedError) as error:
        # torch goes on with a list of all that it could run on
        return f"{backend.name} does not run on {device}: {_first_line(error).partition('. ')[0]}"
    return ""


def _broken(name: str, error: Exception) -> str:
    return f"{name} cannot be imported: {_first_line(error)} (sftdist doctor says what would fit)"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
