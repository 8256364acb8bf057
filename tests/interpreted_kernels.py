"""Fused kernels against torch's on a CPU, in triton's interpreter; run by `tests/unit/model/test_kernels.py`."""

from __future__ import annotations

import sys
from importlib import import_module, util
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from transformers import PreTrainedModel
from triton.runtime import interpreter

from sftdist.model.backends.registry import open_layer_kernels, open_loss_kernel
from sftdist.model.loss import LogitTransform, Losses, LossModel, chunked_ce, reference_ce, rows_into_gradients
from tests.models import tiny_model
from tests.packed import gradients, random_row, relative

CPU = torch.device("cpu")
_as_tensor, _patched = interpreter._implicit_cvt, interpreter._patch_lang_tensor


def _as_compiled(argument: Any) -> Any:
    """Compiled kernels get a number with a fraction as a float32 scalar; the interpreter hands over Python's, which has
    none of the methods that Liger's kernels call on it."""
    if type(argument) is float:
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _as_tensor(argument)


def _with_bounds_of_loops(tensor: Any, scope: Any) -> None:
    """A scalar is an array of one element there, which numpy 2 does not take as a whole number any more."""
    _patched(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._implicit_cvt = _as_compiled
interpreter._patch_lang_tensor = _with_bounds_of_loops
if util.find_spec("liger_kernel") is not None:  # functions of CUDA's own library, which is not there
    geglu, rms_norm = (import_module(f"liger_kernel.ops.{name}") for name in ("geglu", "rms_norm"))
    rms_norm.rsqrt = lambda value: tl.math.rsqrt(value)  # type: ignore[attr-defined]
    geglu.tanh = lambda value: 2 * tl.sigmoid(2 * value) - 1  # type: ignore[attr-defined]
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.5), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)]
without_liger = pytest.mark.skipif(util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns", [5, 4096, 8192 + 77])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_losses_and_gradients_of_rows(transform: LogitTransform, columns: int, weighted: bool) -> None:
    kernel = open_loss_kernel()
    assert not isinstance(kernel, str), kernel
    fused = kernel.rows_into_gradients
    generator = torch.Generator().manual_seed(columns)
    logits = 4 * torch.randn(3, columns, generator=generator)
    targets = torch.tensor([0, columns - 1, columns // 2])
    weights = torch.tensor([0.5, 0.0, 3.0]) if weighted else None
    plain, ours = logits.clone(), logits.clone()
    expected = rows_into_gradients(plain, targets, weights, transform, True)
    assert relative(fused(ours, targets, weights, transform, True), expected) < 1e-6
    assert relative(ours, plain) < 2e-6
    untouched = logits.clone()
    assert relative(fused(untouched, targets, weights, transform, False), expected) < 1e-6
    assert torch.equal(untouched, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_with_the_fused_rows(dtype: torch.dtype) -> None:
    kernel = open_loss_kernel()
    assert not isinstance(kernel, str), kernel
    fused = kernel.rows_into_gradients
    torch.manual_seed(0)
    hidden, head = torch.randn(20, 16).to(dtype).requires_grad_(), nn.Linear(16, 300, bias=False).to(dtype)
    targets, weights = torch.randint(300, (20,)), torch.rand(20)
    wide, wide_head = hidden.detach().float().requires_grad_(), nn.Linear(16, 300, bias=False)
    wide_head.weight = nn.Parameter(head.weight.detach().float())

    def gradient(losses: Losses, of: Tensor, by: nn.Linear) -> Tensor:
        return torch.cat([g.float().flatten() for g in torch.autograd.grad(losses.total, (of, by.weight))])

    exact = gradient(reference_ce(wide, wide_head, targets, weights), wide, wide_head)
    plain = chunked_ce(hidden, head, targets, weights, 8)
    ours = chunked_ce(hidden, head, targets, weights, 8, row_losses=fused)
    assert relative(ours.tokens, plain.tokens) < 1e-6
    error = relative(gradient(plain, hidden, head), exact)
    # the interpreter cuts float32 off where a GPU rounds it to bf16; tests/gpu has the bound for a GPU
    assert relative(gradient(ours, hidden, head), exact) < 2 * error + 1e-6


def with_liger(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice: as it is, and with Liger's kernels."""
    liger = open_layer_kernels()
    assert not isinstance(liger, str), liger
    plain, fused = tiny_model(family), tiny_model(family)
    assert liger.why_not(plain.config, CPU) == ""
    liger.use(fused)
    return plain, fused


@without_liger
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral"])
def test_loss_and_gradients_of_a_model(family: str) -> None:
    plain, fused = (LossModel(model, 2).train() for model in with_liger(family))
    row = random_row([9, 14, 3])
    expected, found = plain(**row.fields()), fused(**row.fields())
    assert relative(found.per_source, expected.per_source) < 1e-5
    assert relative(gradients(fused, found.sum), gradients(plain, expected.sum)) < 1e-5
    assert list(fused.state_dict()) == list(plain.state_dict())
    bound = [name for name, module in fused.named_modules() if "forward" in vars(module)]
    assert len(bound) > 2  # something was replaced at all


@without_liger
def test_other_models_of_the_process_keep_their_own() -> None:
    modeling = sys.modules["transformers.models.llama.modeling_llama"]
    classes = {name: value for name, value in vars(modeling).items() if isinstance(value, type)}
    for _ in range(2):
        with_liger("llama")
    assert {name: value for name, value in vars(modeling).items() if isinstance(value, type)} == classes
    rotary = modeling.apply_rotary_pos_emb
    assert rotary.args[1].__module__ == modeling.__name__  # used twice, and still what it was off the GPU
    assert not any("forward" in vars(module) for module in tiny_model("llama").modules())


@without_liger
def test_an_unknown_family_is_named() -> None:
    liger = open_layer_kernels()
    assert not isinstance(liger, str), liger
    assert liger.why_not(tiny_model("gpt2").config, CPU) == "liger has no kernels for gpt2"
