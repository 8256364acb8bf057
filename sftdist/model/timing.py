"""How long an optimizer step takes, predicted: pure arithmetic on FLOPs, bytes and rates; nothing is measured here.

A step is `packs` micro-batches dealt to the ranks, then one update. For the busiest rank, with m micro-batches:

    step = m * max(compute, overlapped communication of a micro-batch) + what is left + optimizer
    compute = (matmul + attention + elementwise + head + dequantise) / balance, each term a roofline:
              max(FLOPs / (rate of the GPU * share achieved), bytes / memory rate, launches)

- A pass over the layers reads all weights and reads and writes the activations of each product: small packs are bound
  by that and not by FLOPs. Backward is two passes in a full fine-tune (inputs and weights) and one with frozen weights
  (the input's); recomputed layers go forward once more.
- Attention's backward counts twice its forward.
- Communication in rings: every rank sends S (n - 1) / n bytes to gather or scatter S bytes, twice that to reduce them
  to all; the slower of the link within a node and of the network between nodes decides, and each collective waits a
  latency. Gradients go in float32, weights in the compute type.
  ZeRO 0 and 1 reduce to all once, beside the last backward; 2 scatters in each micro-batch; 3 gathers the weights for
  forward and for backward, and scatters, and its hooks in Python take time in every layer. 1 and 2 gather the updated
  weights at the end of the step, beside nothing. A CPU overlaps nothing.
- An update reads and writes gradients, masters and moments: in the GPU's memory, or over PCIe and in the host's.

The constants are those that bring published figures about right (tests/unit/model/test_timing.py names them); they
are good for choosing between settings, and for the cost of a job within a third.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sftdist.model import cost
from sftdist.model.hardware import Cluster, Gpu

ACHIEVED = 0.62  # of the peak, by the large products of real models: clocks, tiles and tails
ATTENTION_ACHIEVED = 0.40  # of the peak, by flash attention over documents of some hundred to some thousand tokens
STREAM = 0.8  # of the memory's rate
LINK = 0.8  # of a link's rate
LAUNCH = 4e-6  # seconds a kernel, which a small layer does not fill
KERNELS = 45  # of one layer's forward, unfused
LATENCY = 20e-6  # of one collective within a node; doubled with every doubling of the nodes, logarithmically
HOOKS = 0.3e-3  # seconds that ZeRO 3's gathering takes in Python, for each layer and pass
FP32 = 1 / 16  # of the bf16 rate: float32 without TF32


@dataclass(frozen=True, slots=True)
class Work:
    """What is trained, and how. `recomputed`: layers that go forward twice; `trainable`: parameters with gradients.

    `quantised`: the frozen weights lie in 4 bits and are made bf16 in each pass. `fused`: norms, rotary embedding and
    MLP take one pass over memory each (liger, or compiled).
    """

    stage: int = 0
    offload: bool = False
    method: str = "full"
    trainable: int | None = None
    quantised: bool = False
    recomputed: int = 0
    precision: str = "bf16"
    moments: int = 2
    fused: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step's packs. Means over packs: `tokens`, `pairs` forward FLOPs of attention, `supervised` targets.

    `balance`: mean over largest cost of the ranks, 1 where nobody waits.
    """

    packs: int
    tokens: float
    pairs: float
    supervised: float
    balance: float = 1.0

    def micro(self, ranks: int) -> int:
        """Packs of the busiest rank."""
        return -(-self.packs // ranks)


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds of one step on the busiest rank. Communication: what overlaps with compute (`hidden`: the part that
    compute covers) and what does not. `total` is no plain sum: hidden communication costs nothing."""

    matmul: float
    attention: float
    elementwise: float
    recompute: float
    waiting: float
    communication: float
    hidden: float
    optimizer: float
    offload: float

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.elementwise + self.recompute

    @property
    def exposed(self) -> float:
        """Communication that nothing covers."""
        return self.communication - self.hidden

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.exposed + self.optimizer + self.offload


@dataclass(frozen=True, slots=True)
class _Pass:
    """Seconds of one forward pass of a pack over all layers."""

    matmul: float
    attention: float
    elementwise: float
    dequantise: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.elementwise + self.dequantise


def full_packs(config: Mapping[str, Any], packs: int, tokens: int, length: int, supervised: float) -> Step:
    """A step of full packs whose documents all have `length` tokens, `supervised` of 1 of them targets."""
    pairs = sum(flops * cost.visible_pairs(length, window) for flops, window in cost.attention_terms(config))
    return Step(packs, tokens, pairs * tokens / length, supervised * tokens)


def step_seconds(config: Mapping[str, Any], work: Work, step: Step, cluster: Cluster) -> Terms:
    """Seconds of one optimizer step, by term."""
    gpu, layers = cluster.gpu, cost.shape_of(config).layers
    micro = step.micro(cluster.gpus)
    forward = _forward(config, work, step, gpu)
    products = 2.0 if work.method == "full" else 1.0
    head = (1.0 + products) * _head(config, work, step, gpu)
    gradients = _accumulate(config, work, gpu)
    matmul = (1.0 + products) * forward.matmul + 2.0 * forward.dequantise + head
    attention = 3.0 * forward.attention
    elementwise = 3.0 * forward.elementwise + gradients
    recompute = work.recomputed / layers * forward.total
    compute = matmul + attention + elementwise + recompute
    waiting = micro * compute * (1.0 / step.balance - 1.0)
    backward = compute - forward.total - head / (1.0 + products)
    each, last, after = _communication(config, work, cluster)
    hidden = micro * min(each, compute) + min(last, backward) if gpu.overlaps else 0.0
    hooks = 3 * layers * HOOKS if work.stage == 3 else 0.0
    optimizer, offload = _update(config, work, cluster)
    return Terms(
        matmul=micro * matmul,
        attention=micro * attention,
        elementwise=micro * elementwise,
        recompute=micro * recompute,
        waiting=waiting,
        communication=micro * (each + hooks) + last + after,
        hidden=hidden,
        optimizer=optimizer,
        offload=offload,
    )


def roofline(flops: float, moved: float, gpu: Gpu, precision: str = "bf16", achieved: float = ACHIEVED) -> float:
    """Seconds of products with so many FLOPs and bytes: whichever of the two takes longer."""
    rate = gpu.flops * achieved * (FP32 if precision == "fp32" else 1.0)
    return max(flops / rate, moved / (gpu.memory_rate * STREAM))


def _forward(config: Mapping[str, Any], work: Work, step: Step, gpu: Gpu) -> _Pass:
    shape, counts = cost.shape_of(config), cost.parameters(config)
    size = _size(work)
    looked_up = counts.embedding * (1 if shape.tied else 2)
    moved = float(size * (counts.total - looked_up))
    moved += size * step.tokens * counts.linear_io * _active(shape)
    matmul = roofline(cost.dense_flops(config) * step.tokens, moved, gpu, work.precision)
    attention = roofline(step.pairs, 0.0, gpu, work.precision, ATTENTION_ACHIEVED)
    bytes_moved = step.tokens * shape.layers * _elementwise_bytes(shape, size, work.fused)
    elementwise = bytes_moved / (gpu.memory_rate * STREAM)
    launches = shape.layers * KERNELS * LAUNCH * (0.5 if work.fused else 1.0)
    elementwise += max(0.0, launches - matmul - attention - elementwise)
    dequantised = 2.5 * (counts.total - counts.embedding) if work.quantised else 0.0  # read 4 bits, write 16
    return _Pass(matmul, attention, elementwise, dequantised / (gpu.memory_rate * STREAM))


def _active(shape: cost.Shape) -> float:
    """Of the linear layers' inputs and outputs, those that one token passes through."""
    return 1.0 if not shape.experts else shape.experts_per_token / shape.experts


def _elementwise_bytes(shape: cost.Shape, size: int, fused: bool) -> float:
    """Bytes that one token moves through the norms, the residuals, the rotary embedding and the MLP's activation of
    one layer, forward. Unfused, as transformers writes them: a norm goes through float32 in five kernels."""
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    width = shape.experts_per_token * shape.expert_intermediate if shape.expert_layers else shape.intermediate
    norm, rotary, activation = (2 * size, 2 * size, 3 * size) if fused else (4 * size + 20, 10 * size, 5 * size)
    return (2 * norm + 6 * size) * shape.hidden + rotary * rotated + activation * width


def _head(config: Mapping[str, Any], work: Work, step: Step, gpu: Gpu) -> float:
    """The LM head forward at the supervised positions, and its softmax, which reads and writes float32 once."""
    counts, shape = cost.parameters(config), cost.shape_of(config)
    product = roofline(cost.head_flops(config) * step.supervised, counts.head * _size(work), gpu, work.precision)
    return product + 8.0 * shape.vocabulary * step.supervised / (gpu.memory_rate * STREAM)


def _accumulate(config: Mapping[str, Any], work: Work, gpu: Gpu) -> float:
    """Adding a micro-batch's gradients to the sum in float32."""
    return _trainable(config, work) * (_size(work) + 8.0) / (gpu.memory_rate * STREAM)


def _communication(config: Mapping[str, Any], work: Work, cluster: Cluster) -> tuple[float, float, float]:
    """Seconds (in each micro-batch beside compute, once beside the last backward, at the end beside nothing)."""
    if cluster.gpus == 1:
        return 0.0, 0.0, 0.0
    trained, size, layers = _trainable(config, work), _size(work), cost.shape_of(config).layers
    scatter = ring(4.0 * trained, cluster, math.ceil(4.0 * trained / 2**27))
    gather = ring(float(size) * trained, cluster, math.ceil(size * trained / 2**27))
    if work.stage == 0:
        return 0.0, 2.0 * scatter, 0.0
    if work.stage == 1:
        return 0.0, 2.0 * scatter, gather
    if work.stage == 2:
        return scatter, 0.0, gather
    stored = cost.parameters(config).total * (0.52 if work.quantised else size)
    weights = ring(stored, cluster, layers)
    return 2.0 * weights + ring(4.0 * trained, cluster, layers), 0.0, 0.0


def ring(size: float, cluster: Cluster, collectives: int) -> float:
    """Seconds to gather, or to reduce and scatter, `size` bytes over all GPUs in so many collectives.

    Each GPU receives size (n - 1) / n over its link. Each node receives size (N - 1) / N over the adapters of all its
    GPUs. Rings run through both at once, so the slower one decides.
    """
    ranks, nodes, per_node = cluster.gpus, cluster.nodes, min(cluster.per_node, cluster.gpus)
    within = size * (ranks - 1) / ranks / (cluster.gpu.link_rate * LINK) if per_node > 1 else 0.0
    between = size * (nodes - 1) / nodes / (cluster.network_rate * per_node * LINK)
    return max(within, between) + collectives * LATENCY * (1.0 + math.log2(nodes))


def _update(config: Mapping[str, Any], work: Work, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the update (on the GPU, in the host's memory and over PCIe): the first or the second is zero."""
    own = _trainable(config, work) / (cluster.gpus if work.stage >= 1 else 1)
    size = _size(work)
    moved = 4.0 + 8.0 + 8.0 * work.moments + size  # gradient read, master and moments read and written, weight written
    if not work.offload:
        return own * moved / (cluster.gpu.memory_rate * STREAM), 0.0
    here = min(cluster.per_node, cluster.gpus)
    host = own * moved / (cluster.host_memory_rate / here)
    return 0.0, host + own * (4.0 + size) / (cluster.gpu.host_rate * LINK)


def _trainable(config: Mapping[str, Any], work: Work) -> int:
    return cost.parameters(config).total if work.trainable is None else work.trainable


def _size(work: Work) -> int:
    """Bytes of a number in the compute type."""
    return 4 if work.precision == "fp32" else 2
