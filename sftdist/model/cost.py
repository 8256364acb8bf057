"""What a model costs: parameters, FLOPs, bytes. Arithmetic on a config mapping; no torch, no weights.

A config mapping is what `PreTrainedConfig.to_dict()` gives. Decoder families with gated MLPs, mixtures of
experts included, are counted to the parameter; any other model_type is counted as if it were a Llama.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.model.buckets import reduce_bucket

GIB = 2**30

_QK_NORM = {"qwen3", "qwen3_moe", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3_text"}
_QKV_BIAS = {"qwen2", "qwen2_moe"}
_EXPERT_BIAS_AND_SINKS = {"gpt_oss"}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that costs follow from. `windows`: one entry per layer, None where attention is full."""

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    windows: tuple[int | None, ...]
    expert_layers: int
    experts: int
    experts_per_token: int
    expert_intermediate: int
    attention_bias: bool
    mlp_bias: bool

    @property
    def layers(self) -> int:
        return len(self.windows)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Read the sizes from a config mapping, by the names that transformers uses."""
    text = config.get("text_config") or config
    if "num_attention_heads" not in text:
        raise ConfigError(
            f"model: given {text.get('model_type')}, a model without attention; required is one that has attention in "
            "some layers at least: what it costs is not known otherwise"
        )
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0
    layers = text["num_hidden_layers"]
    dense_only = set(text.get("mlp_only_layers") or ())
    step = text.get("decoder_sparse_step") or 1
    sparse = [i for i in range(layers) if i not in dense_only and (i + 1) % step == 0] if experts else []
    return Shape(
        model_type=text.get("model_type", "llama"),
        hidden=hidden,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        intermediate=text.get("intermediate_size") or 4 * hidden,
        vocabulary=text["vocab_size"],
        tied=bool(text.get("tie_word_embeddings", False)),
        windows=_windows(text, layers),
        expert_layers=len(sparse),
        experts=experts,
        experts_per_token=text.get("num_experts_per_tok") or 1,
        expert_intermediate=text.get("moe_intermediate_size") or text.get("intermediate_size") or 0,
        attention_bias=bool(text.get("attention_bias", False)),
        mlp_bias=bool(text.get("mlp_bias", False)),
    )


def outside_text(config: Mapping[str, Any]) -> int:
    """Parameters that no text passes through: a vision tower of SigLIP's shape and a projector, as Gemma 3 has them."""
    vision = config.get("vision_config")
    if not vision:
        return 0
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    attention, mlp = 4 * hidden * (hidden + 1), 2 * hidden * inner + inner + hidden
    places = (vision.get("image_size", 224) // patch) ** 2
    patches = hidden * (vision.get("num_channels", 3) * patch**2 + 1 + places)
    pooling = 3 * hidden + attention + mlp if vision.get("vision_use_head", True) else 0
    layers = vision["num_hidden_layers"] * (attention + mlp + 4 * hidden)
    return int(patches + layers + 2 * hidden + pooling + hidden * (shape_of(config).hidden + 1))


def _windows(text: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    kinds = text.get("layer_types") or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts. `total` is what is stored, `active` what one token passes through, lookup of the embedding left out.

    `matmul`: the active weights of all layers' matrix products (head left out).
    """

    total: int
    active: int
    embedding: int
    head: int
    matmul: int
    linear_io: int


def parameters(config: Mapping[str, Any]) -> Parameters:
    """Count parameters from a config mapping."""
    s = shape_of(config)
    query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = s.hidden * (query + 2 * key) + query * s.hidden
    mlp, expert = 3 * s.hidden * s.intermediate, 3 * s.hidden * s.expert_intermediate
    router = s.hidden * s.experts
    small = _small_per_layer(s)
    dense_layers = s.layers - s.expert_layers
    expert_layer = attention + s.experts * expert + router + small
    dense_layer = attention + mlp + small + (2 * s.intermediate + s.hidden if s.mlp_bias else 0)
    embedding = s.vocabulary * s.hidden
    layers = s.expert_layers * expert_layer + dense_layers * dense_layer
    layers += s.expert_layers * _expert_extras(s)
    matmul = s.layers * attention + dense_layers * mlp + s.expert_layers * (s.experts_per_token * expert + router)
    return Parameters(
        total=layers + s.hidden + embedding * (1 if s.tied else 2),
        active=matmul + s.layers * small + s.hidden + embedding,
        embedding=embedding,
        head=embedding,
        matmul=matmul,
        linear_io=_linear_io(s),
    )


def _small_per_layer(s: Shape) -> int:
    """Norms and attention biases of one layer."""
    query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim
    norms = (4 if s.model_type in _FOUR_NORMS else 2) * s.hidden
    norms += 2 * s.head_dim if s.model_type in _QK_NORM else 0
    has_bias = s.attention_bias or s.model_type in _QKV_BIAS
    biases = query + 2 * key if has_bias else 0
    return norms + biases + (s.hidden if s.attention_bias else 0)


def _expert_extras(s: Shape) -> int:
    if s.model_type not in _EXPERT_BIAS_AND_SINKS:
        return 0
    return s.heads + s.experts + s.experts * (2 * s.expert_intermediate + s.hidden)


def _linear_io(s: Shape) -> int:
    """Sum of (inputs + outputs) over the linear layers and experts: a LoRA adapter has r times as many parameters."""
    query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = (s.hidden + query) + 2 * (s.hidden + key) + (query + s.hidden)
    mlp = 3 * (s.hidden + s.intermediate)
    # gate and up of an expert are one fused matrix
    expert = (s.hidden + 2 * s.expert_intermediate) + (s.expert_intermediate + s.hidden)
    return s.layers * attention + (s.layers - s.expert_layers) * mlp + s.expert_layers * s.experts * expert


def lora_parameters(config: Mapping[str, Any], r: int) -> int:
    """Trainable parameters of LoRA with rank r on every linear layer and expert."""
    return r * parameters(config).linear_io


# FLOPs ------------------------------------------------------------------------------------------------------------


def dense_flops(config: Mapping[str, Any]) -> float:
    """Forward FLOPs per token of all layers' matrix products; a multiply and an add are two."""
    return 2.0 * parameters(config).matmul


def head_flops(config: Mapping[str, Any]) -> float:
    """Forward FLOPs of the LM head per supervised position."""
    return 2.0 * parameters(config).head


def attention_terms(config: Mapping[str, Any]) -> tuple[tuple[float, int | None], ...]:
    """(forward FLOPs per visible query-key pair, window) for each kind of layer, summed over its layers."""
    s = shape_of(config)
    per_layer = 4.0 * s.heads * s.head_dim  # scores and weighted values, two FLOPs each
    kinds = sorted(set(s.windows), key=lambda window: window or 0)
    return tuple((per_layer * s.windows.count(window), window) for window in kinds)


def visible_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of causal attention over one document: the query itself included."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def train_factors(method: str = "full") -> tuple[float, float]:
    """How often the forward FLOPs of (matrix products with the model's weights, attention) are spent in training.

    The backward pass makes two products for each of the forward's, one where the weight is frozen.
    """
    return (3.0 if method == "full" else 2.0), 3.0


def token_flops(config: Mapping[str, Any], method: str = "full", r: int = 0) -> float:
    """FLOPs of forward and backward per token in all layers' matrix products, adapters of rank r on them included.

    Adapters are trained, so their products count three times. Under the first layer nothing is trained beside frozen
    embeddings: its q, k and v need no gradient of their input.
    """
    counts, shape = parameters(config), shape_of(config)
    dense = train_factors(method)[0] * dense_flops(config)
    if method == "full":
        return dense
    inputs = 2.0 * shape.hidden * ((shape.heads + 2 * shape.kv_heads) * shape.head_dim + 3 * r)
    return dense + 6.0 * r * _active_io(shape, counts) - inputs


def _active_io(shape: Shape, counts: Parameters) -> float:
    """`linear_io` of what one token passes through: of the experts, only those that it is sent to."""
    expert = 3 * (shape.hidden + shape.expert_intermediate) - shape.hidden  # gate and up are one matrix
    return counts.linear_io - shape.expert_layers * (shape.experts - shape.experts_per_token) * expert


def train_flops(
    config: Mapping[str, Any], lengths: Iterable[int], supervised: int, *, method: str = "full", r: int = 0
) -> float:
    """FLOPs of forward and backward over documents of these lengths with this many supervised positions in all.

    The model's own: what is computed twice to save memory is left out (`recomputed_flops`), and so is padding, of which
    there is none. `r`: rank of the adapters of LoRA and QLoRA. Left out as well: with adapters on fused experts, PEFT
    computes the gradient of the whole expert on its way to theirs.
    """
    lengths = list(lengths)
    dense, attention = train_factors(method)
    pairs = sum(flops * sum(visible_pairs(n, window) for n in lengths) for flops, window in attention_terms(config))
    head = dense * head_flops(config) * supervised
    return token_flops(config, method, r) * sum(lengths) + attention * pairs + head


def recomputed_flops(
    config: Mapping[str, Any], lengths: Iterable[int], layers: int, *, method: str = "full", r: int = 0
) -> float:
    """FLOPs that recomputing the first `layers` layers adds: their forward once more, as far as torch goes on with it.

    It stops at the last tensor that the backward pass needs: before the last product of a layer, `down_proj` or its
    adapter, unless a norm or an expert's weight follows. Recomputation also makes the first layer's input require a
    gradient, which LoRA without it saves.
    """
    lengths, shape, counts = list(lengths), shape_of(config), parameters(config)
    if not layers:
        return 0.0
    per_pair = 4.0 * shape.heads * shape.head_dim
    pairs = sum(per_pair * visible_pairs(n, window) for n in lengths for window in shape.windows[:layers])
    adapter = 0 if method == "full" else r
    forward = (dense_flops(config) + 2.0 * adapter * _active_io(shape, counts)) * layers / shape.layers
    if not shape.expert_layers and shape.model_type not in _FOUR_NORMS:
        forward -= 2.0 * layers * (adapter or shape.intermediate) * shape.hidden
    if method != "full":
        forward += 2.0 * shape.hidden * ((shape.heads + 2 * shape.kv_heads) * shape.head_dim + 3 * r)
    return forward * sum(lengths) + pairs


# Memory -----------------------------------------------------------------------------------------------------------

PASSING = ("activations", "logits", "gathering")  # parts that are there during a micro-batch only
# What the process takes before any model: CUDA's context and its libraries, or an interpreter with torch on the host.
CONTEXT = {"cuda": 1.5 * GIB, "cpu": 0.6 * GIB}
FRAGMENTS = 0.1  # of all parts: what an allocator cannot use
# DeepSpeed's defaults of ZeRO 3: so many parameters stay gathered, and are fetched ahead into a buffer beside them.
LIVE, PREFETCHED = 1_000_000_000, 50_000_000
HOST_BLOCK = 2**20  # logits that are float32 at a time on a CPU


@dataclass(frozen=True, slots=True)
class Setup:
    """The choices that memory depends on. `trainable`: parameters with gradients (all of them when None)."""

    stage: int
    world: int
    pack_tokens: int
    precision: str = "bf16"
    trainable: int | None = None
    checkpointing: bool = False
    offload: bool = False
    loss_chunk: int = 2048
    moments: int = 2  # of the optimizer: 2 for AdamW, 1 for SGD with momentum
    recompute_layers: int | None = None  # with checkpointing: of how many layers; None: of all
    quantised: bool = False  # the frozen linear layers lie in 4 bits
    double_quant: bool = True  # and so do most of their constants
    bucket: int | None = None  # elements of a message; None: as the engine chooses
    device: str = "cuda"
    fused_loss: bool = False  # logits in the compute dtype only


def memory(config: Mapping[str, Any], setup: Setup) -> dict[str, float]:
    """Bytes per GPU (or rank on a CPU) by part, at the peak of a step on a full pack.

    ZeRO shares masters and optimizer from stage 1 on, gradients from 2, weights from 3. Gradients add up in float32;
    at stage 1 DeepSpeed also keeps those of the last micro-batch in the compute dtype. It has a float32 copy of the
    weights even where they are float32 themselves, and two buckets for messages, one at stage 3.
    """
    p = parameters(config)
    trainable = p.total if setup.trainable is None else setup.trainable
    is_lora = setup.trainable is not None
    stored = p.total + (trainable if is_lora else 0)
    plain = setup.precision == "fp32"
    compute = 4 if plain else 2
    share = [1.0 / setup.world if setup.stage >= needed else 1.0 for needed in (1, 2, 3)]
    outside = outside_text(config)
    linear = p.total - p.embedding * (1 if shape_of(config).tied else 2) if setup.quantised else 0
    # Of blocks of 64, bytes per weight: one in float32, or in 8 bits with its own constants. Every rank has them all.
    constants = (0.127 if setup.double_quant else 0.5) / 8
    last = compute if setup.stage == 1 and not plain else 0
    states = 0.0 if setup.offload else trainable * share[0]
    bucket = reduce_bucket(trainable) if setup.bucket is None else setup.bucket
    return {
        "weights": linear * (0.5 * share[2] + constants) + (stored + outside - linear) * compute * share[2],
        "gradients": trainable * (4.0 + last) * share[1],
        "masters": 0.0 if plain and setup.stage == 0 else 4.0 * states,
        "optimizer": 4.0 * setup.moments * states,
        "buckets": 4.0 * bucket * (0, 2, 2, 1)[setup.stage],
        "activations": _activations(config, setup, compute),
        "logits": _logits(config, setup, compute, trains_head=not is_lora),
        "gathering": float(compute * (min(p.total, LIVE) + min(p.total, PREFETCHED))) if setup.stage == 3 else 0.0,
        "context": CONTEXT[setup.device],
    }


def _activations(config: Mapping[str, Any], setup: Setup, compute: int) -> float:
    """What one pack keeps for its backward pass."""
    s = shape_of(config)
    query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim
    width = s.experts_per_token * s.expert_intermediate if s.expert_layers else s.intermediate
    # residual twice, two norms (input and float32 copy), q k v before and after rotation, attention output,
    # gate, up, their activation and product
    per_token = compute * (4 * s.hidden + 3 * query + 4 * key + 4 * width) + 8 * s.hidden
    again = (s.layers if setup.recompute_layers is None else setup.recompute_layers) if setup.checkpointing else 0
    # Of a recomputed layer the input is kept. One at a time is there in full again, after the others are gone.
    whole = max(s.layers - again, min(again, 1))
    return float(per_token * setup.pack_tokens * whole + compute * s.hidden * setup.pack_tokens * again)


def _logits(config: Mapping[str, Any], setup: Setup, compute: int, *, trains_head: bool) -> float:
    """Of one chunk: in the compute dtype, three times in float32 where no kernel is fused, and the head's gradient."""
    s = shape_of(config)
    logits = min(setup.loss_chunk, setup.pack_tokens) * s.vocabulary
    block = 0 if setup.fused_loss else logits if setup.device == "cuda" else min(logits, HOST_BLOCK)
    return compute * logits + 12.0 * block + (4.0 * s.vocabulary * s.hidden if trains_head else 0.0)


def total(parts: Mapping[str, float]) -> float:
    """Sum of the parts with the allowance for fragments, in bytes."""
    return sum(parts.values()) + margin(parts)


def host_bytes(config: Mapping[str, Any], setup: Setup) -> float:
    """What a GPU's part of the offloaded optimizer takes of its host: masters, moments, and gradients on their way."""
    trainable = parameters(config).total if setup.trainable is None else setup.trainable
    return trainable * (8.0 + 4.0 * setup.moments) / setup.world if setup.offload else 0.0


def margin(parts: Mapping[str, float]) -> float:
    """What the allocator cannot use, in bytes."""
    return FRAGMENTS * (sum(parts.values()) - parts["context"])
