"""Whether two samples come from one distribution, and how far they are apart: pure functions of counts.

Every test here is exact: where both samples come from one distribution, any way to deal the pooled items to the two is
as likely as the one that was seen, so that the p-values come from draws of the multivariate hypergeometric distribution
(a permutation test that needs counts only), or from its tails. Nothing is assumed of the sizes or of the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.evals.intervals import Estimate

DRAWS = 10_000  # of the permutation test: no p-value is below 1 / (DRAWS + 1)
RESAMPLES = 200
AWAY = (*np.linspace(0, 2, 13).tolist(), *np.geomspace(2.4, 60, 9).tolist())
LEAST = 10  # items of both samples in a category that stands for itself
BINS = 10

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Numbers = Counts | Floats


@dataclass(frozen=True)
class Difference:
    """How two samples of counts over the same categories differ.

    `psi` and `js` with intervals; `p`: how often chance alone gives a `js` as large as the one seen, or a larger one.
    """

    psi: Estimate
    js: Estimate
    p: float


# --- how far apart ------------------------------------------------------------------------------------


def stability_index(one: Numbers, other: Numbers) -> Floats:
    """The population stability index of counts [..., k]: Σ (q - p) ln(q / p), with half an item added to each count.

    Siddiqi, "Credit Risk Scorecards" (Wiley 2006), where below 0.1 is called small and above 0.25 large; it is the
    symmetric divergence of Kullback and Leibler, "On information and sufficiency" (1951).
    """
    p, q = _shares(one + 0.5), _shares(other + 0.5)
    return np.asarray(np.sum((q - p) * np.log(q / p), axis=-1))


def jensen_shannon(one: Numbers, other: Numbers) -> Floats:
    """The Jensen-Shannon divergence of counts [..., k] in bits: 0 for equal shares, 1 where nothing is in both.

    Lin, "Divergence measures based on the Shannon entropy", IEEE Transactions on Information Theory 37 (1991).
    """
    p, q = _shares(one), _shares(other)
    middle = (p + q) / 2
    return np.asarray((_entropy_against(p, middle) + _entropy_against(q, middle)) / 2)


def _shares(counts: NDArray[Any]) -> Floats:
    return np.asarray(counts / counts.sum(axis=-1, keepdims=True), dtype=np.float64)


def _entropy_against(p: Floats, middle: Floats) -> Floats:
    ratio = np.divide(p, middle, out=np.ones_like(p), where=p > 0)
    return np.asarray(np.sum(p * np.log2(ratio), axis=-1))


def difference(one: Counts, other: Counts, rng: np.random.Generator, confidence: float = 0.95) -> Difference:
    """Compare counts [k] of two samples of independent items; each item is in one category."""
    keep = one + other > 0
    one, other = one[keep], other[keep]
    return Difference(*_intervals(one, other, rng, confidence), chance(one, other, rng))


def chance(one: Counts, other: Counts, rng: np.random.Generator) -> float:
    """The p-value of the permutation test on the Jensen-Shannon divergence of counts [k]."""
    dealt = rng.multivariate_hypergeometric(one + other, int(other.sum()), size=DRAWS, method="marginals")
    by_chance, seen = jensen_shannon(one + other - dealt, dealt), jensen_shannon(one, other)
    as_large = int(np.count_nonzero(by_chance >= seen - 1e-12))
    return (as_large + 1) / (DRAWS + 1)


def _intervals(one: Counts, other: Counts, rng: np.random.Generator, confidence: float) -> tuple[Estimate, Estimate]:
    """Of both divergences, by the bootstrap of tests turned around (Carpenter, "Test inversion bootstrap confidence
    intervals", Journal of the Royal Statistical Society B 61, 1999).

    The divergence of two samples is larger than that of their distributions, and scatters more the larger it is. So
    samples are drawn from pairs of distributions that are `AWAY` times as far from the pooled one as those seen: the
    ends are those pairs for which what was seen is just not too large, and just not too small; the value is the pair
    for which it is the median.
    """
    sizes, pooled = (int(one.sum()), int(other.sum())), _shares(one + other)
    towards = [np.subtract(_shares(counts), pooled) for counts in (one, other)]
    if not np.abs(towards[0]).max() > 1e-12:  # equal shares point nowhere: any direction will do
        zigzag = np.where(np.arange(len(pooled)) % 2, 1e-3, -1e-3)
        towards = [zigzag, -zigzag]
    below = (1 - confidence) / 2
    true, ends = np.empty((2, len(AWAY))), np.empty((2, 3, len(AWAY)))
    for i, away in enumerate(AWAY):
        pair = [_shares(np.maximum(pooled + away * direction, 0.0)) for direction in towards]
        drawn = [rng.multinomial(size, shares, size=RESAMPLES) for size, shares in zip(sizes, pair, strict=True)]
        for k, measure in enumerate((stability_index, jensen_shannon)):
            true[k, i] = measure(pair[0] * min(sizes), pair[1] * min(sizes)) if away else 0.0
            ends[k, :, i] = np.quantile(measure(*drawn), [below, 0.5, 1 - below])
    found = []
    for k, measure in enumerate((stability_index, jensen_shannon)):
        seen = float(measure(one, other))
        high, value, low = (float(np.interp(seen, np.maximum.accumulate(end), true[k])) for end in ends[k])
        found.append(Estimate(min(max(value, low), high), low, high))
    return found[0], found[1]


def basic_interval(seen: float, again: Floats, confidence: float, most: float) -> Estimate:
    """The basic bootstrap interval of a divergence (Davison and Hinkley, "Bootstrap Methods", 1997, section 5.2), for
    items that can be drawn again but not from other distributions.

    A divergence of samples is larger than that of the distributions, and that of resamples larger again by as much:
    both ends and the value are moved back by it, and stay between 0 and `most`.
    """
    low, high = np.quantile(again, [(1 - confidence) / 2, (1 + confidence) / 2])
    ends = (2 * seen - float(again.mean()), 2 * seen - float(high), 2 * seen - float(low))
    return Estimate(*(float(min(max(0.0, end), most)) for end in ends))


# --- categories ---------------------------------------------------------------------------------------


def common(pooled: Counts) -> NDArray[np.int64]:
    """[k] the new number of each category: its own where it has at least `LEAST` items, else the last, of all rest.

    Looking at the pooled counts alone keeps the test exact.
    """
    large = pooled >= LEAST
    return np.where(large, np.cumsum(large) - 1, large.sum())


def neighbours(pooled: Counts) -> NDArray[np.int64]:
    """[k] the new number of each of the ordered categories: at most about `BINS` of about as many items."""
    before = np.concatenate([[0], np.cumsum(pooled)[:-1]]) + pooled / 2
    found = np.floor(before / max(1, pooled.sum()) * BINS).astype(np.int64)
    return np.asarray(np.unique(found, return_inverse=True)[1], dtype=np.int64)


def merged(counts: Counts, numbers: NDArray[np.int64]) -> Counts:
    """The counts of the new categories."""
    return np.bincount(numbers, weights=counts, minlength=int(numbers.max(initial=0)) + 1).astype(np.int64)


# --- shares -------------------------------------------------------------------------------------------


def tails(have: Counts, of: int, live: Counts, live_of: int) -> tuple[Floats, Floats]:
    """Fisher's exact test of shares `have / of` and `live / live_of`, for counts [k]: P(<= live) and P(>= live)."""
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of + live_of + 1)))])
    both = zip(live.tolist(), (have + live).tolist(), strict=True)
    found = [_tails(one, pooled, live_of, of + live_of, log_factorials) for one, pooled in both]
    few, many = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return few, many


def far_off(have: Counts, of: int, live: Counts, live_of: int) -> NDArray[np.bool_]:
    """[k] which live counts are further than 2.5 standard deviations from what is expected: the others need no test
    where there are a hundred of them."""
    pooled, total = have + live, of + live_of
    share = live_of / total
    variance = pooled * share * (1 - share) * (total - pooled) / max(1, total - 1)
    return np.asarray(np.abs(live - pooled * share) > 2.5 * np.sqrt(variance))


def _tails(live: int, pooled: int, live_of: int, total: int, log_factorials: Floats) -> tuple[float, float]:
    least, most = max(0, pooled + live_of - total), min(pooled, live_of)
    x = np.arange(least, most + 1)

    def choose(n: int, k: NDArray[np.int64]) -> Floats:
        return np.asarray(log_factorials[n] - log_factorials[k] - log_factorials[n - k])

    logs = choose(pooled, x) + choose(total - pooled, live_of - x) - choose(total, np.array(live_of))
    chances = np.exp(logs)
    return float(min(1.0, chances[: live - least + 1].sum())), float(min(1.0, chances[live - least :].sum()))


def share(count: int, of: int, confidence: float = 0.95) -> Estimate:
    """A share with the interval of Wilson, "Probable inference" (JASA 22, 1927): of any number of items at once."""
    if not of:
        return Estimate(0.0, 0.0, 1.0)
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), count / of
    middle, half = p + z * z / (2 * of), z * sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return Estimate(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


# --- several tests ------------------------------------------------------------------------------------


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests that hold over all of them together, whatever they have to do with one another.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    found, largest = [1.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        found[i] = largest
    return found
