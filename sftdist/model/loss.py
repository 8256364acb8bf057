"""The training loss: hidden states at supervised positions, then a chunked linear cross-entropy.

Real chat data supervises 20-70 % of the tokens, so hidden states are gathered before the LM head, and
the logits of at most `chunk` positions exist at a time. The matmul runs in the compute dtype, softmax
and sums in float32. `reference_ce` is the plain path beside the fast ones, under the same test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from sftdist.model.backends.interface import Documents
from sftdist.model.text_part import causal_lm, decoder_of

IGNORED = -100  # a position without a target
BLOCK_ELEMENTS = {False: 2**20, True: 2**28}  # logits in float32 at a time; True: on CUDA

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to the output of its head: times `scale`, then softcap * tanh(x / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitTransform:
        """Read it from the fields that Gemma, Cohere and Granite use; start-up compares with the model's own logits."""
        text = config.get_text_config(decoder=True)
        scale = getattr(text, "logit_scale", None) or 1.0
        divisor = getattr(text, "logits_scaling", None) or 1.0
        return cls(scale=scale / divisor, softcap=getattr(text, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def backward_(self, gradient: Tensor, transformed: Tensor) -> Tensor:
        """Turn the gradient of the transformed logits into that of the raw ones, in place."""
        if self.softcap is not None:
            gradient.mul_(1.0 - (transformed / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


IDENTITY = LogitTransform()

# (logits [n,V], targets [n], weights [n] or None, transform, with gradient) -> losses [n]; see `rows_into_gradients`
RowLosses = Callable[[Tensor, Tensor, Tensor | None, LogitTransform, bool], Tensor]
# (logits [n,V] float32, targets [n]) -> losses [n], with the graph
TokenLoss = Callable[[Tensor, Tensor], Tensor]


class Losses(NamedTuple):
    """`total`: float32 scalar with the graph, Σ weight * cross-entropy. `tokens`: [N] float32, unweighted, no graph."""

    total: Tensor
    tokens: Tensor


class LossOutput(NamedTuple):
    """`sum`: float32 scalar with graph. `per_source`, `counts`: [S] float32, no graph: Σ weighted loss, Σ weight."""

    sum: Tensor
    per_source: Tensor
    counts: Tensor


def token_ce(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token."""
    return cross_entropy(logits, targets, reduction="none")


def reference_ce(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor | None,
    transform: LogitTransform = IDENTITY,
    token_loss: TokenLoss = token_ce,
) -> Losses:
    """Cross-entropy (or another loss) with all logits at once: hidden [N,H], targets [N] int64, weights [N] float32 or
    None."""
    logits = transform(head(hidden).float())
    tokens = token_loss(logits, targets)
    return Losses((tokens if weights is None else tokens * weights).sum(), tokens.detach())


def chunked_ce(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    weights: Tensor | None,
    chunk: int,
    transform: LogitTransform = IDENTITY,
    row_losses: RowLosses | None = None,
    token_loss: TokenLoss = token_ce,
) -> Losses:
    """The same as `reference_ce` with the logits of at most `chunk` positions alive.

    A plain linear head takes the fast way, which makes the gradients together with the loss. A head that
    must be called as a module (an adapter sits on it) is recomputed in the backward pass instead. `row_losses`: a
    kernel in place of `rows_into_gradients`, for the fast way; `token_loss`: the same loss, for the other.
    """
    if _is_plain_linear(head):
        weight = cast(Tensor, head.weight)
        how = (chunk, transform, row_losses or rows_into_gradients, torch.is_grad_enabled())
        total, tokens = _FusedHead.apply(hidden, weight, targets, weights, *how)
        return Losses(total, tokens)
    return _recomputed(hidden, head, targets, weights, chunk, transform, token_loss)


def _is_plain_linear(head: nn.Module) -> bool:
    """True if the weight can be used directly: no bias, no adapter, and whole (ZeRO-3 may have left it empty).

    In fp16 the loss scale must already be in the weights: the fast way makes the logits' gradient with them.
    """
    return type(head) is nn.Linear and head.bias is None and head.weight.numel() > 0


class _FusedHead(torch.autograd.Function):
    """Loss and gradients chunk by chunk in one pass, so that no logits are kept or made twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        chunk: int,
        transform: LogitTransform,
        row_losses: RowLosses,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        grad_weight: Tensor | None = None
        wants_weight = grad_enabled and ctx.needs_input_grad[1]
        tokens = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.T
            part_weights = None if weights is None else weights[part]
            tokens[part] = row_losses(logits, targets[part], part_weights, transform, grad_enabled)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if wants_weight:
                grad_weight = _add_product(grad_weight, logits.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(tokens)
        return (tokens if weights is None else tokens * weights).sum(), tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        scaled_hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        scaled_weight = None
        if grad_weight is not None:  # scaled and rounded in one pass, without a float32 copy of that size
            scaled_weight = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            torch.mul(grad_weight, scale, out=scaled_weight)
        return scaled_hidden, scaled_weight, *[None] * 6


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in float32: chunks that add up in low precision would round the sum once more each."""
    if left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        # the matrix units sum in float32 anyway: handed over as that, the product is neither rounded nor read again
        if total is None:
            return torch.mm(left, right, out_dtype=torch.float32)
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    product = left @ right
    return product.float() if total is None else total.add_(product)


def rows_into_gradients(
    logits: Tensor, targets: Tensor, weights: Tensor | None, transform: LogitTransform, grad_enabled: bool
) -> Tensor:
    """Return the losses [n]; overwrite the logits [n,V] with weight * (softmax - one-hot) through the transform.

    Row block by row block, so that float32 copies stay small: in the caches of a CPU, a fraction of the logits
    on a GPU.
    """
    rows = max(1, BLOCK_ELEMENTS[logits.device.type == "cuda"] // logits.shape[1])
    losses = []
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        index = targets[part, None]
        transformed = transform(logits[part].float())
        log_probabilities = torch.log_softmax(transformed, dim=-1)
        losses.append(-log_probabilities.gather(1, index).squeeze(1))
        if grad_enabled:
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
            if weights is not None:
                gradient.mul_(weights[part, None])
            logits[part] = transform.backward_(gradient, transformed)
    return torch.cat(losses)


def _recomputed(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    weights: Tensor | None,
    chunk: int,
    transform: LogitTransform,
    token_loss: TokenLoss,
) -> Losses:
    weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights

    def one(hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        losses = reference_ce(hidden, head, targets, weights, transform, token_loss)
        return losses.total, losses.tokens

    parts = zip(hidden.split(chunk), targets.split(chunk), weights.split(chunk), strict=True)
    results = [checkpoint(one, *part, use_reentrant=False) for part in parts]
    totals, tokens = zip(*results, strict=True)
    return Losses(torch.stack(totals).sum(), torch.cat(tokens))


class HeadLoss(nn.Module):
    """`chunked_ce` as a module of its own, for ZeRO-3: the engine has the head's weight gathered once around it.

    Ranks have different numbers of supervised tokens and so of chunks. Gathered by each call of the head, the
    weight would cost a collective per chunk, and ranks would wait for each other for ever.
    """

    def __init__(
        self,
        chunk: int,
        transform: LogitTransform,
        row_losses: RowLosses | None = None,
        token_loss: TokenLoss = token_ce,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.transform = transform
        self.row_losses = row_losses
        self.token_loss = token_loss

    def forward(self, hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor | None) -> Losses:
        how = (self.chunk, self.transform, self.row_losses, self.token_loss)
        return chunked_ce(hidden, head, targets, weights, *how)


class LossModel(nn.Module):
    """A causal language model (or a PEFT model around one) whose forward is the training loss of one packed row.

    The loss runs inside the module that the engine wraps: under ZeRO-3 the LM head has no weight outside.
    """

    def __init__(
        self,
        model: nn.Module,
        num_sources: int,
        chunk: int = 2048,
        row_losses: RowLosses | None = None,
        token_loss: TokenLoss = token_ce,
    ) -> None:
        super().__init__()
        self.model = model
        self.num_sources = num_sources
        self.head_loss = HeadLoss(chunk, LogitTransform.of(causal_lm(model).config), row_losses, token_loss)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        source: Tensor,
        weights: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
        index: Tensor | None = None,
    ) -> LossOutput:
        """ids, targets, positions [T] int64, weights [T] float32 or None, cu_seqlens [D+1] int32, source [D] int64.

        `lengths` and `index` as in a `Batch`: without them they are read from the device, which then is waited for.
        """
        documents = Documents.of(cu_seqlens, lengths)
        hidden = hidden_states(self.model, ids, positions, documents)
        index = supervised_positions(targets) if index is None else index
        chosen = targets[index]
        # where nothing is supervised one ignored position keeps the graph: its target is any, its weight zero
        counted = (chosen != IGNORED).float() if weights is None else weights[index] * (chosen != IGNORED)
        all_ones = weights is None and len(index) > 1  # a single one may be the ignored one: its weight says
        head = causal_lm(self.model).get_output_embeddings()
        losses = self.head_loss(hidden.index_select(0, index), head, chosen.clamp_min(0), None if all_ones else counted)
        sources = source.repeat_interleave(cu_seqlens.diff(), output_size=documents.tokens)[index]
        empty = torch.zeros(self.num_sources, dtype=torch.float32, device=ids.device)
        return LossOutput(
            sum=losses.total,
            per_source=empty.index_add(0, sources, losses.tokens * counted),
            counts=empty.index_add(0, sources, counted),
        )


@contextmanager
def heard_losses(module: LossModel) -> Iterator[list[Tensor]]:
    """Inside, each forward adds its losses to the list: float32 [N], unweighted, at the places of its `index`."""
    heard: list[Tensor] = []
    handle = module.head_loss.register_forward_hook(lambda part, inputs, losses: heard.append(losses.tokens.detach()))
    try:
        yield heard
    finally:
        handle.remove()


def supervised_positions(targets: Tensor) -> Tensor:
    """[N] int64 indices with a target; position 0 where there is none, so that the graph and its collectives stay."""
    index = (targets != IGNORED).nonzero().squeeze(1)
    return index if len(index) else torch.zeros(1, dtype=torch.int64, device=targets.device)


def hidden_states(model: nn.Module, ids: Tensor, positions: Tensor, documents: Documents) -> Tensor:
    """[T,H]: what the LM head would be given for one packed row."""
    output = decoder_of(causal_lm(model))(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, **documents.model_arguments()
    )
    return cast(Tensor, output.last_hidden_state[0])
