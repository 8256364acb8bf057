"""X7: the chunked loss equals the plain one, whatever the head, the dtype, the chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sftdist.model.loss import IDENTITY, LogitTransform, Losses, LossModel, chunked_ce, reference_ce
from tests.models import tiny_model
from tests.packed import gradients, random_row, relative

POSITIONS, WIDTH, ROWS = 50, 24, 96
TRANSFORMS = [IDENTITY, LogitTransform(scale=0.25), LogitTransform(softcap=2.0), LogitTransform(2.0, 3.0)]


class ModuleHead(nn.Linear):
    """Any class but nn.Linear itself is called as a module and recomputed, as a partitioned head is."""


def _problem(dtype: torch.dtype, head_class: type[nn.Linear]) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = (torch.randn(POSITIONS, WIDTH, generator=generator) * 2).to(dtype).requires_grad_()
    head = head_class(WIDTH, ROWS, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(ROWS, WIDTH, generator=generator) * 0.5)
    targets = torch.randint(ROWS, (POSITIONS,), generator=generator)
    weights = torch.rand(POSITIONS, generator=generator)
    weights[10:20] = 0.0  # with chunks of 5, two chunks without any weight
    return hidden, head.to(dtype), targets, weights


def _gradient(losses: Losses, hidden: Tensor, head: nn.Linear, scale: float = 0.37) -> Tensor:
    grads = torch.autograd.grad(losses.total * scale, (hidden, head.weight))
    return torch.cat([gradient.float().flatten() for gradient in grads])


@pytest.mark.parametrize("head_class", [nn.Linear, ModuleHead])
@pytest.mark.parametrize("chunk", [1, 5, 7, POSITIONS, 10 * POSITIONS])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_float32_loss_and_gradients_equal_the_plain_path(
    head_class: type[nn.Linear], chunk: int, transform: LogitTransform
) -> None:
    hidden, head, targets, weights = _problem(torch.float32, head_class)
    plain = reference_ce(hidden, head, targets, weights, transform)
    ours = chunked_ce(hidden, head, targets, weights, chunk, transform)
    assert relative(ours.total, plain.total) < 1e-6
    assert relative(ours.tokens, plain.tokens) < 1e-6
    assert relative(_gradient(ours, hidden, head), _gradient(plain, hidden, head)) < 1e-6


@pytest.mark.parametrize("head_class", [nn.Linear, ModuleHead])
@pytest.mark.parametrize("chunk", [1, 7, POSITIONS])
def test_bf16_is_as_close_to_float32_as_the_plain_path(head_class: type[nn.Linear], chunk: int) -> None:
    hidden, head, targets, weights = _problem(torch.bfloat16, head_class)
    exact_hidden = hidden.detach().float().requires_grad_()
    exact_head = nn.Linear(WIDTH, ROWS, bias=False)
    exact_head.weight = nn.Parameter(head.weight.detach().float())
    exact = reference_ce(exact_hidden, exact_head, targets, weights)
    exact_gradient = _gradient(exact, exact_hidden, exact_head)
    plain_error = relative(_gradient(reference_ce(hidden, head, targets, weights), hidden, head), exact_gradient)

    ours = chunked_ce(hidden, head, targets, weights, chunk)

    assert relative(ours.total, exact.total) < 1e-3
    assert relative(_gradient(ours, hidden, head), exact_gradient) < 1.5 * plain_error


def test_cross_entropy_in_bf16_is_rejected() -> None:
    """The bound on the loss notices a softmax in bf16."""
    hidden, head, targets, weights = _problem(torch.bfloat16, nn.Linear)
    exact = reference_ce(hidden, head, targets, weights).total
    per_token = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    assert relative((per_token * weights.to(torch.bfloat16)).sum().float(), exact) > 1e-3


def test_a_dropped_last_chunk_is_rejected() -> None:
    hidden, head, targets, weights = _problem(torch.float32, nn.Linear)
    plain = reference_ce(hidden, head, targets, weights)
    short = chunked_ce(hidden[:49], head, targets[:49], weights[:49], 7)
    assert relative(short.total, plain.total) > 1e-6


@pytest.mark.parametrize("head_class", [nn.Linear, ModuleHead])
def test_a_frozen_head_gives_gradients_to_the_hidden_states_only(head_class: type[nn.Linear]) -> None:
    hidden, head, targets, weights = _problem(torch.float32, head_class)
    head.requires_grad_(False)
    ours = chunked_ce(hidden, head, targets, weights, 7)
    plain = reference_ce(hidden, head, targets, weights)
    (got,), (expected,) = (torch.autograd.grad(losses.total, (hidden,)) for losses in (ours, plain))
    assert relative(got, expected) < 1e-6


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "mixtral"])
def test_a_row_without_targets_gives_zero_and_a_graph_through_every_parameter(family: str) -> None:
    model = tiny_model(family)
    row = random_row([5, 9])
    row.targets.fill_(-100)
    output = LossModel(model, num_sources=2)(**row.fields())
    assert output.sum.item() == 0.0
    assert output.counts.tolist() == [0.0, 0.0]
    output.sum.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_an_empty_pack_is_one_ignored_token() -> None:
    model = tiny_model("llama_tied")
    empty = LossModel(model, num_sources=1)(
        ids=torch.tensor([3]),
        targets=torch.tensor([-100]),
        positions=torch.tensor([0]),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        source=torch.tensor([0]),
        weights=torch.tensor([0.0]),
    )
    assert gradients(model, empty.sum).norm().item() == 0.0


def test_no_more_than_chunk_positions_have_logits() -> None:
    """The largest tensor made by the loss alone has chunk x vocabulary elements, forward and backward."""
    hidden, head, targets, weights = _problem(torch.float32, ModuleHead)
    sizes: list[int] = []
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[0]))
    chunked_ce(hidden, head, targets, weights, 7).total.backward()
    assert max(sizes) == 7
    assert sum(sizes) == 2 * POSITIONS
