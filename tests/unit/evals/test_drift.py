"""Divergences, exact tests and their corrections, against hand-computed cases, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import hypergeom

from sftdist.evals.drift import (
    LEAST,
    basic_interval,
    chance,
    common,
    difference,
    far_off,
    holm,
    jensen_shannon,
    merged,
    neighbours,
    share,
    stability_index,
    tails,
)


def counts(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_the_stability_index_by_hand() -> None:
    # (49.5 + 0.5) / 100 against (29.5 + 0.5) / 100, so to say: 0.2 ln(5/3) + 0.2 ln(7/5)
    found = stability_index(np.array([49.5, 49.5]), np.array([29.5, 69.5]))
    assert found == pytest.approx(0.2 * np.log(0.5 / 0.3) + 0.2 * np.log(0.7 / 0.5))
    assert stability_index(counts(10, 20), counts(10, 20)) == 0
    assert np.isfinite(stability_index(counts(10, 0), counts(0, 10)))


def test_jensen_shannon_by_hand_and_as_scipy() -> None:
    assert jensen_shannon(counts(7, 0), counts(0, 3)) == pytest.approx(1)
    assert jensen_shannon(counts(2, 4), counts(1, 2)) == pytest.approx(0)
    one, other = counts(5, 3, 0, 12), counts(1, 9, 4, 2)
    assert jensen_shannon(one, other) == pytest.approx(jensenshannon(one, other, base=2) ** 2)
    both = jensen_shannon(np.stack([one, other]), np.stack([other, other]))
    assert both.tolist() == pytest.approx([float(jensen_shannon(one, other)), 0.0])


def test_tails_are_those_of_the_hypergeometric_distribution() -> None:
    have, live = counts(3, 40, 0, 200), counts(20, 10, 9, 10)
    few, many = tails(have, 300, live, 100)
    for i in range(len(have)):
        chances = hypergeom(400, int(have[i] + live[i]), 100)
        assert few[i] == pytest.approx(chances.cdf(live[i]))
        assert many[i] == pytest.approx(chances.sf(live[i] - 1))


def test_only_counts_far_from_what_is_expected_are_worth_a_test() -> None:
    assert far_off(counts(30, 30, 0), 300, counts(11, 40, 0), 100).tolist() == [False, True, False]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_share_and_its_interval() -> None:
    found = share(5, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert share(0, 0).high == 1.0


def test_rare_categories_stand_together_and_neighbours_hold_as_many() -> None:
    pooled = counts(LEAST, 1, LEAST + 5, 2)
    assert merged(pooled, common(pooled)).tolist() == [LEAST, LEAST + 5, 3]
    many = counts(*[1] * 100)
    assert merged(many, neighbours(many)).tolist() == [10] * 10
    one_heavy = counts(1, 98, 1)
    assert merged(one_heavy, neighbours(one_heavy)).sum() == 100


@pytest.mark.parametrize("sizes", [(60, 40), (500, 100), (2000, 300)])
def test_samples_of_one_distribution_have_small_p_as_seldom_as_they_say(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(sizes[0])
    shares = np.array([0.4, 0.3, 0.2, 0.06, 0.03, 0.01])
    values = []
    for _ in range(100):
        one, other = (rng.multinomial(size, shares) for size in sizes)
        numbers = common(one + other)
        values.append(chance(merged(one, numbers), merged(other, numbers), rng))
    assert np.mean(np.array(values) <= 0.1) <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 100)
    assert np.mean(np.array(values) <= 0.5) >= 0.5 - 4 * np.sqrt(0.25 / 100)  # nor is it a test that never speaks


def test_a_difference_that_is_there_is_found() -> None:
    found = difference(counts(500, 300, 200), counts(100, 100, 100), np.random.default_rng(0))
    assert found.p < 0.001
    assert 0 < found.psi.low < found.psi.value < found.psi.high
    assert 0 < found.js.low < found.js.high < 1


def covered(one: np.ndarray, other: np.ndarray, sizes: tuple[int, int], draws: int) -> tuple[float, float]:
    """How often the interval holds the true Jensen-Shannon divergence: ours, and the percentiles of resamples."""
    rng, truth = np.random.default_rng(sizes), float(jensen_shannon(one, other))
    ours = simpler = 0
    for _ in range(draws):
        seen = [rng.multinomial(size, shares) for size, shares in zip(sizes, (one, other), strict=True)]
        again = jensen_shannon(*(rng.multinomial(counts.sum(), counts / counts.sum(), size=300) for counts in seen))
        found = difference(seen[0], seen[1], rng).js
        ours += found.low <= truth <= found.high
        simpler += float(np.quantile(again, 0.025)) <= truth <= float(np.quantile(again, 0.975))
    return ours / draws, simpler / draws


def test_the_interval_knows_that_divergences_of_samples_are_too_large() -> None:
    """Percentiles of resamples, which would be simpler, lie above the truth where that is small."""
    ours, simpler = covered(np.full(8, 1 / 8), np.full(8, 1 / 8), (400, 200), 40)
    assert ours >= 0.85
    assert simpler <= 0.1


def test_the_interval_of_items_that_can_only_be_drawn_again() -> None:
    rng, shares, wrong, right = np.random.default_rng(1), np.full(8, 1 / 8), 0, 0
    for _ in range(60):
        one, other = (rng.multinomial(size, shares) for size in (400, 200))
        again = jensen_shannon(*(rng.multinomial(c.sum(), c / c.sum(), size=400) for c in (one, other)))
        wrong += float(np.quantile(again, 0.025)) > 1e-3
        right += basic_interval(float(jensen_shannon(one, other)), again, 0.95, 1.0).low > 1e-3
    assert wrong > 50
    assert right <= 6


def test_samples_that_are_the_same_have_an_interval_from_0_on() -> None:
    found = difference(counts(20, 30), counts(20, 30), np.random.default_rng(0))
    assert found.p == 1
    assert (found.js.low, found.js.value) == (0, 0)
    assert 0.01 < found.js.high < 0.1
    assert difference(counts(50, 0), counts(30, 0), np.random.default_rng(0)).js.high == 0


@pytest.mark.long
@pytest.mark.parametrize("other", [[0.5, 0.3, 0.15, 0.05], [0.47, 0.3, 0.15, 0.08], [0.35, 0.3, 0.2, 0.15]])
@pytest.mark.parametrize("sizes", [(500, 100), (2000, 300), (2000, 5000)])
def test_intervals_hold_what_they_promise(sizes: tuple[int, int], other: list[float]) -> None:
    """At least 90 % of intervals of 95 % hold the divergence of the distributions, from 100 live items on."""
    assert covered(np.array([0.5, 0.3, 0.15, 0.05]), np.array(other), sizes, 400)[0] >= 0.9
