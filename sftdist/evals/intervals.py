"""How far a figure can be trusted: intervals of means over prompts, also of what sets two models apart on the same.

A Bayesian bootstrap (Rubin 1981): the prompts are weighed anew by Dirichlet weights, thousands of times; the spread of
the means is the spread of the figure. Alone it knows only what was seen: 20 right answers of 20 would give the interval
1.0 to 1.0. So one more prompt is weighed with the others, which nobody saw: for the lower end its value is the worst
that is possible, for the upper end the best (Gaffke 2005; Learned-Miller and Thomas, arXiv 1905.06208). For right or
wrong answers that is exactly the interval of Clopper and Pearson (1934), which holds for any share and any number of
prompts; for 20 of 20 it begins at 0.83.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
_BEYOND = 10  # resamples that lie beyond each end of an interval, at least
_AT_ONCE = 1 << 20  # numbers drawn at a time: 8 MiB


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval. All three are NaN where a value that went into it is no finite number."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """A metric in figures; `change` is tuned minus base on the same prompts.

    `effective`: how many prompts of equal weight would say as much as these `n`: (Σ w)² / Σ w² (Kish 1965).
    """

    n: int
    tuned: Estimate
    base: Estimate | None
    change: Estimate | None
    effective: float


class Paired(Protocol):
    """What `figures` reads of `evals.report.Scores`, which is described there."""

    @property
    def tuned(self) -> Sequence[float]: ...
    @property
    def base(self) -> Sequence[float] | None: ...
    @property
    def weights(self) -> Sequence[float] | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


def figures(scores: Paired, confidence: float = 0.95, resamples: int = RESAMPLES) -> Figures:
    """The figures of one metric; the same scores give the same figures. Raises ValueError where there is no prompt."""
    weights, bounds = scores.weights, (scores.low, scores.high)
    tuned = estimate(scores.tuned, weights, confidence, *bounds, resamples)
    n, effective = len(scores.tuned), effective_prompts(_weights(weights, len(scores.tuned)))
    if scores.base is None:
        return Figures(n, tuned, None, None, effective)
    base = estimate(scores.base, weights, confidence, *bounds, resamples)
    return Figures(
        n, tuned, base, change(scores.tuned, scores.base, weights, confidence, *bounds, resamples), effective
    )


def estimate(
    values: Sequence[float],
    weights: Sequence[float] | None,
    confidence: float = 0.95,
    low: float | None = 0.0,
    high: float | None = 1.0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The weighted mean of the values of one model, which lie in `low` to `high` (None: no bound)."""
    found = np.asarray(values, dtype=np.float64)
    return _interval(found, _weights(weights, len(found)), confidence, low, high, resamples, _largest(found))


def change(
    tuned: Sequence[float],
    base: Sequence[float],
    weights: Sequence[float] | None,
    confidence: float = 0.95,
    low: float | None = 0.0,
    high: float | None = 1.0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The weighted mean of tuned minus base, prompt by prompt: what both find hard does not widen the interval.

    `low` and `high` bound the values of either model. Raises ValueError for lists of different length.
    """
    if len(tuned) != len(base):
        raise ValueError(f"tuned and base: given {len(tuned)} and {len(base)} values, required one each per prompt")
    one, other = np.asarray(tuned, dtype=np.float64), np.asarray(base, dtype=np.float64)
    most = None if low is None or high is None else high - low
    least = None if most is None else -most
    scale = max(_largest(one), _largest(other))
    return _interval(one - other, _weights(weights, len(one)), confidence, least, most, resamples, scale)


def effective_prompts(weights: Sequence[float] | Floats) -> float:
    """How many prompts of equal weight would say as much (Kish 1965); 0 where nothing has a weight."""
    found = np.asarray(weights, dtype=np.float64)
    squares = float((found**2).sum())
    return float(found.sum() ** 2 / squares) if squares > 0 else 0.0


def _interval(
    values: Floats,
    weights: Floats,
    confidence: float,
    low: float | None,
    high: float | None,
    resamples: int,
    scale: float,
) -> Estimate:
    """`scale`: how large values are, for values without bounds that are all the same."""
    if not len(values) or not weights.sum() > 0:
        raise ValueError("given no prompt with a weight, required one at least")
    if not np.isfinite(values).all():
        return Estimate(math.nan, math.nan, math.nan)
    value = float(weights @ values / weights.sum())
    # No bound: what nobody saw is taken to lie as far outside of what was seen as that is wide.
    reach = float(np.ptp(values)) or scale
    worst = float(values.min()) - reach if low is None else low
    best = float(values.max()) + reach if high is None else high
    below = (1 - confidence) / 2
    sums, totals, unseen = _resampled(values, weights, max(resamples, math.ceil(_BEYOND / below)))
    lower = np.quantile((sums + unseen * worst) / (totals + unseen), below)
    upper = np.quantile((sums + unseen * best) / (totals + unseen), 1 - below)
    return Estimate(value, min(float(lower), value), max(float(upper), value))


def _resampled(values: Floats, weights: Floats, resamples: int) -> tuple[Floats, Floats, Floats]:
    """Σ e·w·v, Σ e·w and the e·w of the unseen prompt, [resamples] each; e is drawn from Exp(1), so that e / Σ e is a
    Dirichlet weight. Equal numbers of prompts get equal draws."""
    random = np.random.default_rng(0)
    # A token picked at random belongs to a prompt of this weight: heavy prompts are the ones that a sample can lack.
    unseen = random.standard_exponential(resamples) * float((weights**2).sum() / weights.sum())
    sums, totals = np.empty(resamples), np.empty(resamples)
    for part in _parts(resamples, len(values)):
        drawn = random.standard_exponential((part.stop - part.start, len(values)))
        sums[part], totals[part] = drawn @ (weights * values), drawn @ weights
    return sums, totals, unseen


def _parts(resamples: int, width: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // width)
    for start in range(0, resamples, step):
        yield slice(start, min(resamples, start + step))


def _weights(weights: Sequence[float] | None, n: int) -> Floats:
    return np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)


def _largest(values: Floats) -> float:
    return float(np.abs(values).max(initial=0.0))
