"""Which CPUs compute bf16, and where that is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftdist.core.settings import Precision
from sftdist.model.cpu import computes_bf16, is_emulated

MACHINES = [
    ({"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}, False),
    ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
    ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
    ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, True),
    ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
    ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
]


@pytest.mark.parametrize(("machine", "native"), MACHINES)
def test_only_training_in_bf16_on_such_a_cpu_is_emulated(
    machine: dict[str, Any], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: machine)
    assert computes_bf16() == native
    assert is_emulated(Precision.bf16, torch.device("cpu")) == (not native)
    assert not is_emulated(Precision.bf16, torch.device("cuda"))
    assert not is_emulated(Precision.fp32, torch.device("cpu"))


def test_the_names_are_those_of_this_torch() -> None:
    """A name that torch does not know would say of every CPU that it emulates."""
    known = torch.cpu.get_capabilities()
    assert known["architecture"] != "x86_64" or {"avx512_bf16", "amx_bf16"} <= set(known)
