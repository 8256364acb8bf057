"""One packed row of several documents, and the same documents alone through transformers' own eager attention."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sftdist.model.backends.interface import Documents
from tests.models import VOCABULARY

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """The fields of a batch for one row; `source` has one entry per document."""

    ids: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    source: Tensor

    def fields(self) -> dict[str, Tensor]:
        return {
            "ids": self.ids,
            "targets": self.targets,
            "positions": self.positions,
            "cu_seqlens": self.cu_seqlens,
            "source": self.source,
        }

    def spans(self) -> list[slice]:
        bounds = self.cu_seqlens.tolist()
        return [slice(start, end) for start, end in pairwise(bounds)]


def random_row(lengths: list[int], *, seed: int = 0, supervised: float = 0.6, sources: int = 2) -> Row:
    """Random tokens; targets are shifted inside each document, and a share of them is supervised."""
    generator = torch.Generator().manual_seed(seed)
    documents = Documents.of_lengths(lengths)
    ids = torch.randint(VOCABULARY, (documents.tokens,), generator=generator)
    targets = ids.roll(-1)
    targets[documents.cu_seqlens[1:].long() - 1] = IGNORED
    targets[torch.rand(documents.tokens, generator=generator) > supervised] = IGNORED
    source = torch.arange(len(lengths)) % sources
    return Row(ids, targets, documents.positions(), documents.cu_seqlens, source)


def alone(model: PreTrainedModel, row: Row) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of each document run by itself with eager attention, and the number of targets."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    losses = []
    for span in row.spans():
        logits = model(input_ids=row.ids[None, span], use_cache=False).logits[0]
        losses.append(cross_entropy(logits.float(), row.targets[span], ignore_index=IGNORED, reduction="sum"))
    model.set_attn_implementation(before)
    return torch.stack(losses).sum(), int((row.targets != IGNORED).sum())


def gradients(module: nn.Module, loss: Tensor) -> Tensor:
    """All gradients of the trainable parameters as one float32 vector."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.cat([g.float().flatten() for g in torch.autograd.grad(loss, parameters)])


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((value - expected).norm() / expected.norm()).item()
