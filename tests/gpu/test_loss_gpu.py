"""X7 on a CUDA device, and the memory that the chunked loss is there to save."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sftdist.model.loss import Losses, chunked_ce, reference_ce
from tests.packed import relative

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
POSITIONS, WIDTH = 4096, 256


def _problem(rows: int, dtype: torch.dtype) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(POSITIONS, WIDTH, generator=generator).to(CUDA, dtype).requires_grad_()
    head = nn.Linear(WIDTH, rows, bias=False).to(CUDA, dtype)
    return hidden, head, torch.randint(rows, (POSITIONS,), generator=generator).to(CUDA)


def _gradient(losses: Losses, hidden: Tensor, head: nn.Linear) -> Tensor:
    grads = torch.autograd.grad(losses.total / POSITIONS, (hidden, head.weight))
    return torch.cat([gradient.float().flatten() for gradient in grads])


def test_bf16_is_as_close_to_float32_as_the_plain_path() -> None:
    hidden, head, targets = _problem(8192, torch.bfloat16)
    exact_hidden, exact_head = hidden.detach().float().requires_grad_(), nn.Linear(WIDTH, 8192, bias=False)
    exact_head.weight = nn.Parameter(head.weight.detach().float())
    exact = reference_ce(exact_hidden, exact_head, targets, None)
    exact_gradient = _gradient(exact, exact_hidden, exact_head)
    plain_error = relative(_gradient(reference_ce(hidden, head, targets, None), hidden, head), exact_gradient)
    ours = chunked_ce(hidden, head, targets, None, 1000)
    assert relative(ours.total, exact.total) < 1e-3
    assert relative(_gradient(ours, hidden, head), exact_gradient) < 1.5 * plain_error


def test_memory_of_logits_is_that_of_one_chunk() -> None:
    rows, chunk = 128_000, 256
    hidden, head, targets = _problem(rows, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunked_ce(hidden, head, targets, None, chunk).total.backward()
    extra = torch.cuda.max_memory_allocated() - before
    weight_gradients = rows * WIDTH * (4 + 4 + 2 + 2)  # float32 sum and its scaled copy, one product, the gradient
    assert extra < weight_gradients + 4 * chunk * rows * 4
    assert extra < POSITIONS * rows * 4 / 2
