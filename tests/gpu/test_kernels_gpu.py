"""On a GPU: the fused loss against the plain one, Liger's layers and compiled ones against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sftdist.model.backends.registry import open_layer_kernels, open_loss_kernel
from sftdist.model.compiled import compile_layers
from sftdist.model.kernels import choose_kernels
from sftdist.model.loss import Losses, LossModel, chunked_ce, reference_ce
from tests.models import tiny_model
from tests.packed import Row, gradients, random_row, relative

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LOGITS, GRADIENTS = 2e-2, 6e-2  # bf16, relative to the norm, after two layers of large random weights
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral"]


def on_gpu(row: Row) -> dict[str, Tensor]:
    return {name: tensor.to(CUDA) for name, tensor in row.fields().items()}


def assert_alike(plain: LossModel, other: LossModel) -> None:
    """Both in bf16: the loss per source, and gradients no further apart than bf16 makes them."""
    for seed, lengths in enumerate(([9, 14, 3], [120, 40], [64])):
        fields = on_gpu(random_row(lengths, seed=seed))
        expected, found = plain(**fields), other(**fields)
        assert relative(found.per_source, expected.per_source) < LOGITS
        assert relative(gradients(other, found.sum), gradients(plain, expected.sum)) < GRADIENTS


@pytest.mark.parametrize("family", FAMILIES)
def test_ligers_layers(family: str) -> None:
    liger = open_layer_kernels()
    if isinstance(liger, str):
        pytest.skip(liger)
    models = [tiny_model(family).to(CUDA, torch.bfloat16) for _ in range(2)]
    assert liger.why_not(models[1].config, CUDA) == ""
    liger.use(models[1])
    ids = torch.arange(3, 60, device=CUDA)[None]
    # eager attention: the logits through the layers alone
    for model in models:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        plain, fused = (model(input_ids=ids, use_cache=False).logits.float() for model in models)
    assert relative(fused, plain) < LOGITS
    for model in models:
        model.set_attn_implementation("sftdist_per_document")
    assert_alike(*(LossModel(model, 2).train() for model in models))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_layers(family: str) -> None:
    models = [tiny_model(family).to(CUDA, torch.bfloat16) for _ in range(2)]
    compile_layers(models[1])
    assert_alike(*(LossModel(model, 2).train() for model in models))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns", [1000, 32_001, 128_256])
def test_the_fused_loss_is_as_exact_as_the_plain_one(columns: int, weighted: bool) -> None:
    kernel = open_loss_kernel()
    assert not isinstance(kernel, str), kernel  # triton comes with torch for CUDA
    fused = kernel.rows_into_gradients
    torch.manual_seed(0)
    hidden = torch.randn(700, 256, device=CUDA).bfloat16().requires_grad_()
    head = nn.Linear(256, columns, bias=False).to(CUDA, torch.bfloat16)
    wide, wide_head = hidden.detach().float().requires_grad_(), nn.Linear(256, columns, bias=False, device=CUDA)
    wide_head.weight = nn.Parameter(head.weight.detach().float())
    targets = torch.randint(columns, (700,), device=CUDA)
    weights = torch.rand(700, device=CUDA) if weighted else None

    def gradient(losses: Losses, of: Tensor, by: nn.Linear) -> Tensor:
        return torch.cat([g.float().flatten() for g in torch.autograd.grad(losses.total, (of, by.weight))])

    exact = gradient(reference_ce(wide, wide_head, targets, weights), wide, wide_head)
    plain = chunked_ce(hidden, head, targets, weights, 256)
    ours = chunked_ce(hidden, head, targets, weights, 256, row_losses=fused)
    assert relative(ours.tokens, plain.tokens) < 1e-5
    assert relative(gradient(ours, hidden, head), exact) < 1.1 * relative(gradient(plain, hidden, head), exact)


def test_auto_takes_the_fused_loss() -> None:
    chosen = choose_kernels("auto", CUDA, tiny_model("llama").config)
    assert chosen.loss == "triton", chosen
