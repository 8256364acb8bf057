"""What this machine's CPU computes by itself."""

from __future__ import annotations

import torch

from sftdist.core.settings import Precision

_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")  # of x86 and of ARM, as torch names them


def computes_bf16() -> bool:
    """Whether the CPU has instructions for bf16. Elsewhere torch emulates it, at about an eighth of float32's rate on
    two AVX2 cores."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _BF16)


def is_emulated(precision: Precision, device: torch.device) -> bool:
    """Whether training so on this device is several times slower than in float32."""
    return precision == Precision.bf16 and device.type == "cpu" and not computes_bf16()
