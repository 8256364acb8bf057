"""Predicted step times: hand-computed terms, what must never get slower, and published figures."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest

from benchmarks.predictions import LLAMA_8B, PUBLISHED, Published
from sftdist.core.errors import ConfigError
from sftdist.model import cost, timing
from sftdist.model.hardware import CPU, GPUS, Cluster, named, recognised
from sftdist.model.timing import Step, Work, full_packs, ring, roofline, step_seconds

TINY: dict[str, Any] = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
H100 = GPUS["H100"]
EIGHT = Cluster(H100, 8)
PACKS = full_packs(LLAMA_8B, 16, 8192, 8192, 0.5)
LORA = cost.lora_parameters(LLAMA_8B, 16)
WORKS = [
    Work(stage, offload=offload, method=method, trainable=None if method == "full" else LORA, recomputed=recomputed)
    for stage, offload, method, recomputed in product(range(4), (False, True), ("full", "lora"), (0, 8, 32))
    if stage or not offload
]


def seconds(work: Work, cluster: Cluster = EIGHT, step: Step = PACKS) -> float:
    return step_seconds(LLAMA_8B, work, step, cluster).total


def test_a_ring_takes_as_long_as_its_slowest_link() -> None:
    within = 8e9 * 7 / 8 / (450e9 * 0.8)
    assert ring(8e9, EIGHT, 0) == pytest.approx(within)
    assert ring(8e9, EIGHT, 10) == pytest.approx(within + 10 * timing.LATENCY)
    two_nodes = Cluster(H100, 16)
    assert ring(8e9, two_nodes, 0) == pytest.approx(8e9 * 15 / 16 / (450e9 * 0.8)), "eight adapters are enough"
    slow = replace(two_nodes, network_rate=12.5e9)
    assert ring(8e9, slow, 0) == pytest.approx(8e9 / 2 / (12.5e9 * 8 * 0.8))
    assert ring(8e9, slow, 10) == pytest.approx(8e9 / 2 / (12.5e9 * 8 * 0.8) + 20 * timing.LATENCY)


def test_a_roofline_is_flops_or_bytes() -> None:
    assert roofline(1e12, 0.0, H100) == pytest.approx(1e12 / (989e12 * timing.ACHIEVED))
    assert roofline(1e6, 1e9, H100) == pytest.approx(1e9 / (3.35e12 * timing.STREAM))
    assert roofline(1e12, 0.0, H100, "fp32") == pytest.approx(16 * roofline(1e12, 0.0, H100))


def test_the_terms_of_a_step_by_hand() -> None:
    """16 packs on 8 GPUs: 2 micro-batches; the update of an eighth of the parameters."""
    plain = step_seconds(LLAMA_8B, Work(stage=1), PACKS, EIGHT)
    tokens, total = 2 * 8192, 8_030_261_248
    layers = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) * 32
    products = 3 * (layers * tokens + 2 * 128256 * 4096 * tokens / 2) / (989e12 * timing.ACHIEVED)
    softmax = 3 * 8 * 128256 * tokens / 2 / (3.35e12 * timing.STREAM)
    assert plain.matmul == pytest.approx(products + softmax, rel=1e-6)
    pairs = 4 * 4096 * 32 * 8192 * 8193 / 2 * 2
    assert plain.attention == pytest.approx(3 * pairs / (989e12 * timing.ATTENTION_ACHIEVED), rel=1e-6)
    assert plain.optimizer == pytest.approx(total / 8 * (4 + 8 + 16 + 2) / (3.35e12 * timing.STREAM), rel=1e-6)
    assert (plain.recompute, plain.offload, plain.waiting) == (0, 0, 0)
    gathered = total * 2 * 7 / 8 / (450e9 * 0.8)
    assert plain.exposed == pytest.approx(gathered, rel=0.08), "the updated weights alone"
    offloaded = step_seconds(LLAMA_8B, Work(stage=1, offload=True), PACKS, EIGHT)
    assert offloaded.optimizer == 0
    assert offloaded.offload == pytest.approx(total / 8 * (30 / 25e9 + 6 / (64e9 * 0.8)), rel=1e-6)
    again = step_seconds(LLAMA_8B, Work(stage=1, recomputed=32), PACKS, EIGHT)
    half = step_seconds(LLAMA_8B, Work(stage=1, recomputed=16), PACKS, EIGHT)
    assert again.recompute == pytest.approx(2 * half.recompute)
    sums = 2 * total * (2 + 8) / (3.35e12 * timing.STREAM)  # the gradients, added up
    forward = layers * tokens / (989e12 * timing.ACHIEVED) + plain.attention / 3 + (plain.elementwise - sums) / 3
    assert again.recompute == pytest.approx(forward, rel=1e-6)
    lora = step_seconds(LLAMA_8B, Work(stage=1, method="lora", trainable=LORA), PACKS, EIGHT)
    assert lora.matmul == pytest.approx(plain.matmul * 2 / 3, rel=0.01)
    assert lora.attention == plain.attention


def test_communication_by_stage() -> None:
    """In units of the parameters' float32 bytes over the ring: 2, 2 + weights, one a micro-batch + weights."""
    found = {stage: step_seconds(LLAMA_8B, Work(stage=stage), PACKS, EIGHT).communication for stage in range(4)}
    unit = 4 * 8_030_261_248 * 7 / 8 / (450e9 * 0.8)
    assert found[0] == pytest.approx(2 * unit, rel=0.08)
    assert found[1] == pytest.approx(2.5 * unit, rel=0.08)
    assert found[2] == pytest.approx(2.5 * unit, rel=0.08)  # two micro-batches
    hooks = 2 * 3 * 32 * timing.HOOKS
    assert found[3] == pytest.approx(2 * (1 + 2 * 0.5) * unit + hooks, rel=0.05)
    assert step_seconds(LLAMA_8B, Work(stage=2), PACKS, Cluster(H100, 1)).communication == 0


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_a_better_machine_is_never_slower(work: Work) -> None:
    for gpus in (1, 8, 64):
        here = Cluster(H100, gpus)
        now = seconds(work, here) * (1 + 1e-9)
        for name in ("flops", "memory_rate", "link_rate", "host_rate"):
            faster = replace(H100, **{name: 2 * asdict(H100)[name]})
            assert seconds(work, replace(here, gpu=faster)) <= now, name
        assert seconds(work, replace(here, network_rate=2 * here.network_rate)) <= now
        assert seconds(work, replace(here, host_memory_rate=2 * here.host_memory_rate)) <= now


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_more_work_is_never_faster(work: Work) -> None:
    now = seconds(work)
    assert seconds(replace(work, recomputed=32)) >= now
    assert seconds(replace(work, quantised=True)) >= now or work.stage == 3, "4 bits are gathered in less time"
    assert seconds(work, step=replace(PACKS, balance=0.8)) > now
    assert seconds(work, step=replace(PACKS, packs=17)) > now, "one rank has a third pack"
    assert seconds(work, step=replace(PACKS, tokens=PACKS.tokens * 1.1)) > now
    assert seconds(work, step=replace(PACKS, pairs=PACKS.pairs * 2)) > now
    assert seconds(replace(work, fused=True)) < now


def test_waiting_for_the_costliest_rank() -> None:
    terms = step_seconds(LLAMA_8B, Work(stage=0), replace(PACKS, balance=0.8), EIGHT)
    assert terms.waiting == pytest.approx(terms.compute * 0.25)


def test_small_shapes_are_bound_by_launches_and_not_by_flops() -> None:
    packs = full_packs(TINY, 1, 128, 128, 0.5)
    terms = step_seconds(TINY, Work(), packs, Cluster(H100, 1))
    assert terms.compute >= 3 * 4 * timing.KERNELS * timing.LAUNCH
    assert step_seconds(TINY, Work(stage=3), packs, EIGHT).total > step_seconds(TINY, Work(stage=1), packs, EIGHT).total


def test_a_cpu_hides_no_communication() -> None:
    terms = step_seconds(TINY, Work(stage=1), full_packs(TINY, 2, 512, 512, 0.5), Cluster(CPU, 2))
    assert terms.hidden == 0 < terms.communication


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.name)
def test_published_figures(run: Published) -> None:
    assert run.rate / 1.3 < run.predicted < run.rate * 1.3, f"{run.predicted:,.0f}, {run.predicted / run.rate:.2f}"


def test_names_of_gpus() -> None:
    assert named("h100") is named("H100") is H100
    assert named("rtx_4090") is named("RTX 4090") is GPUS["RTX 4090"]
    with pytest.raises(ConfigError, match=r"given 'h10', required one of gb200, .*h100.*; did you mean h100\?"):
        named("h10")
    with pytest.raises(ConfigError, match="required one of"):
        named("")
    assert recognised("NVIDIA H100 80GB HBM3") is H100
    assert recognised("NVIDIA H100 PCIe") is GPUS["H100 PCIe"]
    assert recognised("NVIDIA L40") is None
