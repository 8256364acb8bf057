"""QLoRA on CUDA: bitsandbytes' kernels against whole weights, every ZeRO stage, memory, and no waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sftdist.core.distributed import World
from sftdist.model.compiled import compile_layers
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import LossModel
from sftdist.model.quantised import is_quantised, quantise, whole
from tests.models import tiny_model
from tests.packed import Row, gradients, random_row, relative
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, Case, Run, distance, train_case

pytestmark = pytest.mark.gpu

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.07}
LOGITS, GRADIENTS = 2e-2, 6e-2  # bf16, relative to the norm: the fused kernels sum in another order
STAGES = (0, 1, 2, 3)


def base(family: str, dtype: torch.dtype, device: torch.device = CUDA) -> Any:
    model = tiny_model(family, **SIZES)
    quantise(model, double_quant=True, dtype=dtype, device=device)
    return model


def adapted(model: Any, dtype: torch.dtype) -> LossModel:
    torch.manual_seed(0)
    model, _ = attach(model, LoraSpec(r=4, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if not is_quantised(parameter):
                parameter.data = parameter.data.to(dtype)
    return LossModel(model.to(CUDA), num_sources=2).train()


def on_gpu(row: Row) -> dict[str, torch.Tensor]:
    return {name: tensor.to(CUDA) for name, tensor in row.fields().items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_loss_and_gradients_are_those_of_lora_over_the_whole_values(family: str) -> None:
    """A few tokens, for which bitsandbytes has kernels of their own, and many."""
    packed = base(family, torch.bfloat16)
    plain = tiny_model(family, **SIZES)
    with torch.no_grad():
        for parameter, bits in zip(plain.parameters(), packed.parameters(), strict=True):
            parameter.copy_(whole(bits))
    ours, theirs = adapted(packed, torch.bfloat16), adapted(plain, torch.bfloat16)
    for seed, lengths in enumerate(([2], [9, 14, 3], [120, 400])):
        fields = on_gpu(random_row(lengths, seed=seed))
        found, expected = ours(**fields), theirs(**fields)
        assert relative(found.per_source, expected.per_source) < LOGITS
        assert relative(gradients(ours, found.sum), gradients(theirs, expected.sum)) < GRADIENTS


def test_a_base_that_was_quantised_on_the_host_is_the_same() -> None:
    """An export of a checkpoint does it on the CPU: a value that lies between two levels may fall to either side."""
    there, here = base("llama", torch.bfloat16), base("llama", torch.bfloat16, CPU)
    for (name, one), (_, other) in zip(there.named_parameters(), here.named_parameters(), strict=True):
        if is_quantised(one):
            differs = (whole(one).cpu() - whole(other)).abs() > 1e-2 * whole(other).abs().max()
            assert differs.float().mean() < 1e-4, name
    moved = here.to(CUDA)
    assert all(whole(parameter).device.type == "cuda" for parameter in moved.parameters())


def test_quantising_takes_one_layer_at_a_time() -> None:
    model = tiny_model("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    largest = max(p.numel() for p in model.parameters()) * 4
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantise(model, double_quant=True, dtype=torch.bfloat16, device=CUDA)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    count = sum(whole(p).numel() for p in model.parameters() if is_quantised(p))
    assert held == pytest.approx(count * (4 + 0.127) / 8, rel=0.05)
    assert peak < held + 8 * largest, "a few copies of a layer, not a model"


def run_stages(world: World, case: Case) -> list[Run]:
    assert world.device.type == "cuda"
    return [train_case(world, replace(case, stage=stage)) for stage in STAGES]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_stage_takes_the_same_steps(precision: str) -> None:
    case = Case(0, precision, "llama_tied", ADAMW, lrs=(1e-3,), lora=LoraSpec(r=4), double_quant=True)
    case = replace(case, changes=SIZES)
    first, *others = run_ranks(run_stages, 1, case)[0]
    for run in others:
        assert run.losses == pytest.approx(first.losses, rel=1e-5 if precision == "fp32" else 1e-2)
        assert distance(run.weights, first.weights) < (1e-5 if precision == "fp32" else 1e-2)


def test_nothing_waits_for_the_device() -> None:
    module = adapted(base("llama", torch.bfloat16), torch.bfloat16)
    fields = on_gpu(random_row([120, 400], seed=0))
    module(**fields).sum.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and is_quantised(layer.weight):
                x = torch.ones(64, layer.in_features, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
                layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_layers() -> None:
    eager, compiled = (adapted(base("llama", torch.bfloat16), torch.bfloat16) for _ in range(2))
    compile_layers(compiled.model)
    for seed, lengths in enumerate(([9, 14, 3], [120, 40], [64])):
        fields = on_gpu(random_row(lengths, seed=seed))
        found, expected = compiled(**fields), eager(**fields)
        assert relative(found.per_source, expected.per_source) < LOGITS
        assert relative(gradients(compiled, found.sum), gradients(eager, expected.sum)) < GRADIENTS
