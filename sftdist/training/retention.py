"""Which checkpoints stay: the last ones, every so many steps, and the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """What stays: the `last` ones (at least one), the steps that `every` divides (0: none), and the best one.

    `best` is asked each time something was saved: the evaluation loss by step, lower is better. None: no step is best.
    """

    last: int = 2
    every: int = 0
    best: Callable[[], Mapping[int, float]] | None = None

    def losses(self) -> Mapping[int, float]:
        """The evaluation losses that are known by now."""
        return {} if self.best is None else self.best()


def to_prune(steps: Iterable[int], newest: int, keep: Keep, losses: Mapping[int, float]) -> list[int]:
    """The steps that go after `newest` was written, in increasing order; never `newest`, never the best of `losses`.

    Steps after `newest` did not verify when the run resumed: they are not to be resumed from, and go.
    """
    steps = sorted(steps)
    valid = [step for step in steps if step <= newest]
    kept = {*valid[-max(1, keep.last) :], best_step(valid, losses)}
    if keep.every:
        kept |= {step for step in valid if step % keep.every == 0}
    return [step for step in steps if step not in kept]


def best_step(steps: Iterable[int], losses: Mapping[int, float]) -> int | None:
    """The step with the lowest finite loss, the earlier of two equal ones; None where none has a loss."""
    known = [(losses[step], step) for step in steps if step in losses and math.isfinite(losses[step])]
    return min(known)[1] if known else None
