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
    except (ImportError, OSError, RuntimeError) as error:
        return f"{name} cannot be imported: {str(error).strip().splitlines()[0]}"
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
        return f"{backend.name} does not run on {device}: {str(error).strip().splitlines()[0]}"
    return ""
