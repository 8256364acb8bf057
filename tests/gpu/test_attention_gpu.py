"""X2 and X11 on a CUDA device, in bf16, for every backend that is installed there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from sftdist.model.attention import choose, needs
from sftdist.model.backends.interface import Backend, Documents, LayerArguments
from sftdist.model.backends.registry import PREFERENCE, open_backend
from sftdist.model.backends.sdpa import BACKEND as PER_DOCUMENT
from sftdist.model.checks import check_isolation, check_logits, check_parity
from tests.models import MIXTURES_OF_EXPERTS, SHAPES, VOCABULARY, shape, tiny_model
from tests.packed import relative

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
GRADIENT_TOLERANCE = 2e-2  # bf16 kernels against float32 on the same numbers, relative to the norm


def backend(name: str) -> Backend:
    opened = open_backend(name)
    if isinstance(opened, str):
        pytest.skip(opened)
    return opened


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("family", sorted(SHAPES))
def test_isolation_parity_and_logits_in_bf16(family: str, name: str) -> None:
    opened = backend(name)
    missing = needs(AutoConfig.for_model(**shape(family))) - opened.supports
    if missing:
        pytest.skip(f"{name} does not support {', '.join(sorted(missing))}")
    model = tiny_model(family, attention=name).to(device=CUDA, dtype=torch.bfloat16)
    isolation = check_isolation(model, VOCABULARY, CUDA)
    assert isolation is not None
    assert isolation.exact or family in MIXTURES_OF_EXPERTS
    check_parity(model, opened, VOCABULARY, CUDA, longest=4096)
    check_logits(model, VOCABULARY, CUDA)


@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [[700, 1, 33, 512], [64] * 20])
def test_outputs_and_gradients_equal_float32(lengths: list[int], window: int | None, name: str) -> None:
    opened = backend(name)
    documents = Documents.of_lengths(lengths, CUDA)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(1, documents.tokens, heads, 64, generator=generator) for heads in (8, 2, 2, 8)]
    arguments = LayerArguments(scaling=0.125, sliding_window=window)

    def results(run: Backend, dtype: torch.dtype) -> list[Tensor]:
        query, key, value, direction = (row.to(torch.bfloat16).to(dtype).to(CUDA) for row in rows)
        inputs = [tensor.transpose(1, 2).requires_grad_() for tensor in (query, key, value)]
        output = run(inputs[0], inputs[1], inputs[2], documents, arguments)
        return [output, *torch.autograd.grad((output * direction).sum(), inputs)]

    for ours, exact in zip(results(opened, torch.bfloat16), results(PER_DOCUMENT, torch.float32), strict=True):
        assert relative(ours.float(), exact) < GRADIENT_TOLERANCE


def test_auto_takes_a_variable_length_kernel() -> None:
    choice = choose("auto", CUDA, torch.bfloat16, AutoConfig.for_model(**shape("llama")))
    assert choice.name in {"flash_attn", "torch_varlen"}
    assert choose("auto", CUDA, torch.bfloat16, AutoConfig.for_model(**shape("gpt_oss"))).name == "sdpa"
