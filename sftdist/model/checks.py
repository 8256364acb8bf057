"""Start-up checks on the real model: isolation, attention parity, the path to the logits.

Each runs a few tokens through module calls only (so it works on ZeRO-3 partitions), returns its
figures, raises StartupError where training would give something else than asked for, and leaves no
trace: no gradients, no random numbers drawn, every module in the mode it had. Every rank makes the same
calls, so collectives inside the model stay aligned.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftdist.core.errors import StartupError
from sftdist.model.attention import layer_arguments
from sftdist.model.backends.interface import Backend, Documents
from sftdist.model.loss import LogitTransform, hidden_states
from sftdist.model.text_part import causal_lm

UNPACKED = "set train.packing=false"
PARITY_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest output
LOGIT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest logit
# Batched experts round differently when another document's tokens move between them: that noise, as a share of
# what a leaking control shows on the same model.
EXPERT_NOISE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
EXPERT_NOISE_FLOAT32 = 1e-5  # of the largest hidden state
COMPARED_ROWS = 256  # queries compared with eager attention where the check is long
LONGEST_CHECK = 16_384  # tokens; eager's mask is quadratic


@dataclass(frozen=True, slots=True)
class Isolation:
    """`leak`: largest change in other documents when one token changes; `control`: the same without boundaries."""

    leak: float
    control: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Parity:
    """`errors`: per kind of attention layer the largest deviation from eager, as a share of the largest output.

    `tokens`: length of the check. `covers_windows`: whether it was longer than every window of the model.
    """

    errors: dict[str, float]
    layers: int
    tokens: int
    covers_windows: bool


@contextmanager
def traceless(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states are put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_isolation(
    model: nn.Module, vocabulary: int, device: torch.device, *, packed: bool = True
) -> Isolation | None:
    """Change tokens of the middle one of three documents, its last one among them, beyond which a short convolution
    sees first: nothing before them and no other document may move.

    Bit for bit in dense models. In mixtures of experts within the rounding of the experts and far below a
    control that runs the same tokens as one document. Without packing (`packed=False`) only that a document
    does not see its own future, and None. Raises StartupError if documents, or a document and its future, meet.
    """
    joined = Documents.of_lengths([18], device)
    documents = Documents.of_lengths([6, 4, 8], device) if packed else joined
    ids = _random_ids(documents.tokens, vocabulary, device)
    changed = ids.clone()
    changed[[7, 9]] = (ids[[7, 9]] + 1) % vocabulary
    with traceless(model, device):
        before, after = _both(model, ids, changed, documents)
        past = (after - before)[:7].abs().max().item()
        control_before, control_after = _both(model, ids, changed, joined)
    is_mixed, largest = is_mixture(causal_lm(model).config), before.abs().max().item()
    control = (control_after - control_before)[10:].abs().max().item()
    if control == 0.0:
        raise StartupError(
            "isolation check: a changed token moves nothing even where documents are joined, so the check proves "
            f"nothing on this model: {UNPACKED}"
        )
    if past > 0.0 and not (is_mixed and _is_rounding(past, control, largest, before.dtype)):
        raise StartupError(
            f"isolation check: changing a token moved the hidden states before it by {past:.3g}; "
            "this model sees the future and cannot be trained to predict it"
        )
    if not packed:
        return None
    leak = (after - before)[10:].abs().max().item()
    if leak > 0.0 and not (is_mixed and _is_rounding(leak, control, largest, before.dtype)):
        raise StartupError(
            "isolation check: changing one token of a document moved the hidden states of its neighbours by "
            f"{leak:.3g} ({control:.3g} without any boundary); packed documents must not see each other: {UNPACKED}"
        )
    return Isolation(leak=max(leak, past), control=control, exact=max(leak, past) == 0.0)


def _both(model: nn.Module, one: Tensor, other: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    positions = documents.positions()
    try:
        return hidden_states(model, one, positions, documents), hidden_states(model, other, positions, documents)
    except ValueError as error:  # layers of transformers that know that they cannot keep documents apart
        raise StartupError(f"isolation check: {str(error).rstrip('.')}: {UNPACKED}") from error


def _is_rounding(leak: float, control: float, largest: float, dtype: torch.dtype) -> bool:
    if dtype == torch.float32 and leak > EXPERT_NOISE_FLOAT32 * largest:
        return False
    return leak <= EXPERT_NOISE[dtype] * control


def is_mixture(config: PreTrainedConfig) -> bool:
    """True for a mixture of experts, by the names that the configs of transformers use."""
    text = config.get_text_config(decoder=True)
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in names)


def check_logits(model: nn.Module, vocabulary: int, device: torch.device) -> float:
    """Compare the head path of the loss with the model's own logits; return the deviation as a share of the largest.

    Raises StartupError for a model that does more to its hidden states or logits than the loss knows of.
    """
    documents = Documents.of_lengths([10], device)
    ids, positions = _random_ids(documents.tokens, vocabulary, device), documents.positions()
    causal = causal_lm(model)
    with traceless(model, device):
        hidden = hidden_states(model, ids, positions, documents)
        head = causal.get_output_embeddings()
        ours = LogitTransform.of(causal.config)(head(hidden).float())
        output = causal(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, **documents.model_arguments()
        )
    theirs = output.logits[0].float()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= LOGIT_TOLERANCE[hidden.dtype]:
        raise StartupError(
            f"logits check: hidden states through the head differ from the logits of {type(causal).__name__} by "
            f"{error:.3g} of the largest; this model does something to them that the loss does not know: "
            "it cannot be trained exactly"
        )
    return error


def check_parity(
    model: nn.Module,
    backend: Backend,
    vocabulary: int,
    device: torch.device,
    longest: int,
    *,
    packed: bool = True,
    beyond: int = 0,
) -> Parity:
    """Compare our attention with transformers' eager one for every kind of attention layer of the model.

    The model runs once over one document with a probe in place of its attention: the probe takes the layer's
    own arguments and the mask that the model makes for eager attention, and compares both functions on random
    queries, keys and values. `longest`: the longest document of the run; a window that none exceeds needs no
    proof. `beyond`: the document is longer than this many tokens, where the run has such documents. Raises
    StartupError where they differ, or where a model that is to be packed does not use the registry.
    """
    causal = causal_lm(model)
    # A foreign class: not every architecture bounds its positions.
    positions = getattr(causal.config.get_text_config(decoder=True), "max_position_embeddings", LONGEST_CHECK)
    beyond = max(0, min(beyond, positions - 32))
    tokens = min(max([beyond, *_windows(causal.config)]) + 32, longest, LONGEST_CHECK)
    documents = Documents.of_lengths([tokens], device)
    ids = _random_ids(tokens, vocabulary, device)
    probe = _Probe(backend)
    with traceless(model, device), _attention_replaced(causal, probe):
        hidden_states(model, ids, documents.positions(), documents)
    if probe.calls == 0 and packed:
        raise StartupError(
            f"attention parity: {type(causal).__name__} does not use transformers' attention registry, so nothing is "
            f"known of its attention in a pack: {UNPACKED}"
        )
    _refuse_deviations(probe, backend.name)
    reached = max(_windows(causal.config), default=0) < tokens or tokens == longest
    return Parity(errors=probe.errors, layers=probe.calls, tokens=tokens, covers_windows=reached)


def _refuse_deviations(probe: _Probe, backend: str) -> None:
    bad = [f"{kind}: {error:.3g}" for kind, error in probe.errors.items() if not error <= probe.tolerance]
    if bad:
        fix = "this model cannot be trained exactly" if backend == "sdpa" else "set model.attention=sdpa"
        raise StartupError(
            f"attention parity: {backend} differs from the model's own eager attention by more than "
            f"{probe.tolerance:g} of the largest output in {'; '.join(bad)}: {fix}"
        )


def _windows(config: PreTrainedConfig) -> list[int]:
    """Every window or chunk length that the config names."""
    fields = config.get_text_config(decoder=True).to_dict().items()
    return [value for name, value in fields if type(value) is int and ("window" in name or "chunk" in name)]


def _random_ids(tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (tokens,), generator=generator).to(device)


@contextmanager
def _attention_replaced(model: nn.Module, probe: _Probe) -> Iterator[None]:
    causal = causal_lm(model)
    before = causal.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("sftdist_probe", probe)
    ALL_MASK_ATTENTION_FUNCTIONS.register("sftdist_probe", eager_mask)
    causal.set_attn_implementation("sftdist_probe")
    try:
        yield
    finally:
        causal.set_attn_implementation(before)


@dataclass
class _Probe:
    """Stands in for an attention function; compares each new kind of layer and returns zeros."""

    backend: Backend
    errors: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    tolerance: float = 0.0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None = None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        self.calls += 1
        self.tolerance = PARITY_TOLERANCE[query.dtype]
        arguments = layer_arguments(module, query.shape[-1], given)
        kind = _describe(module, query, key, arguments)
        if documents is None:
            raise StartupError(f"attention parity: {kind} does not receive the documents of a pack: {UNPACKED}")
        if kind not in self.errors:
            query, key, value = (_random_like(tensor, seed) for seed, tensor in enumerate((query, key, value)))
            ours = self.backend(query, key, value, documents, arguments)
            self.errors[kind] = _deviation(ours, module, query, key, value, attention_mask, given)
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _describe(module: nn.Module, query: Tensor, key: Tensor, arguments: Any) -> str:
    parts = [f"{query.shape[1]}/{key.shape[1]} heads of {query.shape[3]}", f"scaling {arguments.scaling:.4g}"]
    parts += [f"window {arguments.sliding_window}"] if arguments.sliding_window is not None else []
    parts += [f"softcap {arguments.softcap:g}"] if arguments.softcap is not None else []
    parts += ["sinks"] if arguments.s_aux is not None else []
    return f"{type(module).__name__}({', '.join(parts)})"


def _random_like(tensor: Tensor, seed: int) -> Tensor:
    """Standard normal; queries (seed 0) 8 times as large, so that scores reach where soft-capping bends them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tensor.shape, generator=generator) * (8.0 if seed == 0 else 1.0)
    return drawn.to(device=tensor.device, dtype=tensor.dtype)


def _deviation(
    ours: Tensor,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    given: dict[str, Any],
) -> float:
    """Largest difference from eager attention in float32, over the first and last rows, as a share of the largest."""
    half = COMPARED_ROWS // 2
    tokens = query.shape[2]
    rows = list(range(tokens)) if tokens <= COMPARED_ROWS else [*range(half), *range(tokens - half, tokens)]
    mask_rows = None if mask is None else mask[:, :, rows].float()
    theirs, _ = _eager(module)(module, query[:, :, rows].float(), key.float(), value.float(), mask_rows, **given)
    theirs = theirs.float()
    return ((ours[:, rows].float() - theirs).abs().max() / theirs.abs().max()).item()


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The plain attention function that stands beside the layer's class in its modelling file."""
    source = vars(sys.modules[type(module).__module__])
    if "eager_attention_forward" not in source:
        raise StartupError(
            f"attention parity: {type(module).__name__} has no eager attention to compare with: {UNPACKED}"
        )
    return cast(Callable[..., tuple[Tensor, Tensor]], source["eager_attention_forward"])
