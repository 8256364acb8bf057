"""Which kernels are chosen, and the fused ones against torch's: on a CPU through triton's interpreter, where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util

import pytest
import torch
from transformers import AutoConfig

from sftdist.core.errors import ConfigError
from sftdist.model import kernels
from sftdist.model.backends import registry
from sftdist.model.kernels import Kernels, choose_kernels
from sftdist.model.loss import rows_into_gradients
from tests.conftest import ROOT
from tests.models import shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA = AutoConfig.for_model(**shape("llama"))


class Fused:
    """Stands in for Liger's file, on a machine that has it."""

    def why_not(self, config: object, device: torch.device) -> str:
        return "" if device.type == "cuda" else f"liger runs on CUDA, not on {device}"


@pytest.fixture
def _with_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "open_layer_kernels", Fused)
    monkeypatch.setattr(kernels, "_why_no_loss", lambda device: "")


def test_torch_is_always_there() -> None:
    assert choose_kernels("torch", CPU, LLAMA) == Kernels()
    chosen = choose_kernels("auto", CPU, LLAMA)
    assert (chosen.layers, chosen.loss) == ("torch", "torch")
    assert str(chosen) == "layers torch, loss torch (fused kernels run on CUDA)"
    assert chosen.row_losses is rows_into_gradients


def test_liger_is_refused_by_name_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "open_layer_kernels", lambda: "liger_kernel is not installed")
    with pytest.raises(ConfigError, match=r"model\.kernels=liger: liger_kernel is not installed; set model\.kernels="):
        choose_kernels("liger", CUDA, LLAMA)


@pytest.mark.usefixtures("_with_liger")
def test_auto_takes_what_runs_on_the_device() -> None:
    assert choose_kernels("auto", CUDA, LLAMA) == Kernels("liger", "triton")
    assert choose_kernels("auto", CPU, LLAMA).layers == "torch"
    compiled = choose_kernels("auto", CUDA, LLAMA, compiled=True)
    assert str(compiled) == "layers torch, loss triton (torch.compile fuses the layers itself)"
    with pytest.raises(ConfigError, match=r"torch\.compile fuses the layers itself"):
        choose_kernels("liger", CUDA, LLAMA, compiled=True)
    with pytest.raises(ConfigError, match="liger runs on CUDA, not on cpu"):
        choose_kernels("liger", CPU, LLAMA)


def test_an_absent_or_broken_package_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "sftdist.model.backends.liger", raising=False)
    said = registry.open_layer_kernels()
    assert isinstance(said, str)
    assert "liger_kernel" in said


COMPILED = """
from itertools import product
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sftdist.model.backends.triton_loss import _rows_into_gradients as kernel
numbers = {"stride": "i32", "targets": "*i64", "weights": "*fp32", "losses": "*fp32", "scale": "fp32", "cap": "fp32"}
for dtype, flag, columns in product(("bf16", "fp32"), (False, True), (8, 128256)):
    given = {"columns": columns, "capped": flag, "weighted": flag, "with_gradient": flag, "block": min(columns, 8192)}
    signature = {"logits": f"*{dtype}", **numbers, **dict.fromkeys(given, "constexpr")}
    signature = {name: signature[name] for name in kernel.arg_names}
    made = compile(ASTSource(kernel, signature, given), GPUTarget("cuda", 90, 32), {"num_warps": 16})
    assert made.asm["cubin"]
"""


def test_the_loss_kernel_compiles_for_a_gpu() -> None:
    """Without one: the interpreter takes what the compiler does not."""
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=without, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.long
def test_fused_kernels_in_tritons_interpreter() -> None:
    """In a process of its own: triton reads the switch when it is imported."""
    if util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--noconftest",
            "tests/interpreted_kernels.py",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout[-4000:]
