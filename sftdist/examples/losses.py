"""Losses per token, to be used and to be copied: `train.loss=sftdist.examples.losses:smoothed`."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy


def smoothed(logits: Tensor, targets: Tensor, *, epsilon: float = 0.1) -> Tensor:
    """Cross-entropy with label smoothing: `epsilon` of each target's weight goes to all tokens alike.

    logits [n,V] float32, targets [n] int64; returns [n].
    """
    return cross_entropy(logits, targets, reduction="none", label_smoothing=epsilon)
