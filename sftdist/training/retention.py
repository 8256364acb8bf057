"""Which checkpoints stay: the last ones, every so many steps, and the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

EVAL_LOSS = "eval/loss"
AWAITED = 3  # checkpoints that are kept because somebody is about to score them


@dataclass(frozen=True)
class Standing:
    """What tells the best checkpoint: the values of a metric by step. `awaited`: somebody scores the checkpoints one
    after another, and those after the last value are still to come."""

    values: Mapping[int, float] = field(default_factory=dict)
    metric: str = EVAL_LOSS
    higher_is_better: bool = False
    awaited: bool = False


@dataclass(frozen=True)
class Keep:
    """What stays: the `last` ones (at least one), the steps that `every` divides (0: none), and the best one.

    `best` is asked each time something was saved. None: no step is best.
    """

    last: int = 2
    every: int = 0
    best: Callable[[], Standing] | None = None

    def standing(self) -> Standing:
        """What is known by now."""
        return Standing() if self.best is None else self.best()


def to_prune(steps: Iterable[int], newest: int, keep: Keep, standing: Standing) -> list[int]:
    """The steps that go after `newest` was written, in increasing order; never `newest`, never the best one.

    Steps after `newest` did not verify when the run resumed: they are not to be resumed from, and go.
    """
    steps = sorted(steps)
    valid = [step for step in steps if step <= newest]
    kept = {*valid[-max(1, keep.last) :], best_step(valid, standing)}
    if keep.every:
        kept |= {step for step in valid if step % keep.every == 0}
    if standing.awaited:
        scored = max(standing.values, default=-1)
        kept |= set([step for step in valid if step > scored][-AWAITED:])
    return [step for step in steps if step not in kept]


def best_step(steps: Iterable[int], standing: Standing) -> int | None:
    """The step with the best finite value, the earlier of two equal ones; None where none has a value."""
    sign = -1.0 if standing.higher_is_better else 1.0
    values = standing.values
    known = [(sign * values[step], step) for step in steps if step in values and math.isfinite(values[step])]
    return min(known)[1] if known else None
