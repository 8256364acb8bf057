"""Schedules of the learning rate, to be used and to be copied: `optimizer.schedule=sftdist.examples.schedules:wsd`."""

from __future__ import annotations

import math


def wsd(step: int, total: int, warmup: int, min_ratio: float, *, decay: float = 0.2, shape: str = "linear") -> float:
    """Warmup, stable, decay: the share of the peak rate at update `step` of `total`, counted from 0.

    Linear warm-up over `warmup` updates, then the peak, and over the last `decay` (a share of all updates) down to
    `min_ratio`, which the last update has. `shape`: linear, or sqrt, which falls fast at first (1 - sqrt, Hägele et al.
    2024, arXiv:2405.18392). Raises ValueError for another shape or share.
    """
    if shape not in ("linear", "sqrt") or not 0 < decay <= 1:
        raise ValueError(
            f"given decay={decay}, shape={shape}; required decay above 0 and up to 1, shape linear or sqrt"
        )
    if step < warmup:
        return (step + 1) / (warmup + 1)
    first = total - max(1, round(decay * total))  # the last update at the peak is the one before it
    if step < first:
        return 1.0
    progress = (step - first + 1) / (total - first)
    left = 1 - progress if shape == "linear" else 1 - math.sqrt(progress)
    return min_ratio + (1 - min_ratio) * left
