"""An interval of 95 % holds the truth at least 93 times of 100, for few prompts, rare errors and heavy weights too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from sftdist.evals import intervals
from sftdist.evals.intervals import Estimate, change, effective_prompts, estimate, figures
from sftdist.evals.report import Scores

Floats = NDArray[np.float64]
Interval = Callable[[Sequence[float]], Estimate]
SHARES = [share / 100 for share in range(2, 99)]
LEAST = 0.93


def ours(values: Sequence[float]) -> Estimate:
    return estimate(values, None, 0.95)


def percentiles(values: Sequence[float]) -> Estimate:
    """The bootstrap that is mostly used, which knows nothing but what was seen."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    return Estimate(float(np.mean(values)), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))


def exact_coverage(interval: Interval, n: int, shares: Sequence[float] = SHARES) -> dict[float, float]:
    """How likely the interval of n answers holds the share of right ones: no simulation, a sum over all outcomes."""

    @cache
    def of(right: int) -> Estimate:
        return interval([1.0] * right + [0.0] * (n - right))

    def likely(right: int, share: float) -> float:
        return math.comb(n, right) * share**right * (1 - share) ** (n - right)

    found = {}
    for share in shares:
        outcomes = [right for right in range(n + 1) if likely(right, share) > 1e-7]
        holds = [right for right in outcomes if of(right).low <= share <= of(right).high]
        found[share] = sum(likely(right, share) for right in holds)
    return found


def coverage(draw: Callable[[np.random.Generator], tuple[Estimate, float]], repeats: int) -> float:
    """How often an interval of new prompts holds the truth."""
    random = np.random.default_rng(7)
    drawn = [draw(random) for _ in range(repeats)]
    return sum(found.low <= truth <= found.high for found, truth in drawn) / repeats


# Right or wrong answers


@pytest.mark.parametrize("n", [20, 50, 150, pytest.param(500, marks=pytest.mark.long)])
def test_the_interval_of_a_share_holds_it(n: int) -> None:
    found = exact_coverage(ours, n, SHARES if n < 150 else SHARES[::8])
    assert min(found.values()) >= LEAST, found


def test_the_plain_bootstrap_would_not_pass() -> None:
    found = exact_coverage(percentiles, 20, [0.02, 0.5, 0.98])
    assert found[0.02] < 0.4
    assert found[0.98] < 0.4
    assert max(found.values()) < 0.96


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (0, 20, 0.0, 0.1684),
        (10, 20, 0.2720, 0.7280),
        (19, 20, 0.7513, 0.9987),
        (20, 20, 0.8316, 1.0),
        (50, 50, 0.9289, 1),
    ],
)
def test_the_interval_of_a_share_is_that_of_clopper_and_pearson(right: int, n: int, low: float, high: float) -> None:
    found = ours([1.0] * right + [0.0] * (n - right))
    assert (found.low, found.high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))
    assert found.value == right / n


def test_more_confidence_and_fewer_prompts_are_wider() -> None:
    values = [1.0, 1.0, 1.0, 0.0] * 25
    widths = [one.high - one.low for one in (estimate(values, None, level) for level in (0.8, 0.95, 0.99, 0.9999))]
    assert widths == sorted(widths)
    assert widths[-1] > 2 * widths[0]
    assert ours(values).high - ours(values).low < ours(values[:40]).high - ours(values[:40]).low


# Other scores


def partly(random: np.random.Generator, n: int) -> tuple[Estimate, float]:
    """Token F1: mostly 1, some in between, a few 0."""
    values = np.where(random.random(n) < 0.9, 1.0, random.beta(0.3, 1.0, n))
    return ours(list(values)), 0.9 + 0.1 * 0.3 / 1.3


def lost(random: np.random.Generator, n: int, spread: float, heavy: float, bond: float) -> tuple[Estimate, float]:
    """A loss per token: log-normal, weighed by log-normal numbers of tokens, which may go with it (`bond`, -1 to 1)."""
    length = random.normal(size=n)
    level = bond * length + math.sqrt(1 - bond**2) * random.normal(size=n)
    found = estimate(list(np.exp(spread * level)), list(np.exp(heavy * length)), 0.95, 0.0, None)
    return found, math.exp(spread**2 / 2 + heavy * spread * bond)


def moved(random: np.random.Generator, n: int, won: float, fallen: float) -> tuple[Estimate, float]:
    """Two models that differ on few prompts."""
    drawn = random.random(n)
    base = np.where(drawn < won, 0.0, 1.0)
    tuned = np.where((drawn >= won) & (drawn < won + fallen), 0.0, 1.0)
    return change(list(tuned), list(base), None, 0.95), won - fallen


def loss_moved(random: np.random.Generator, n: int, heavy: float) -> tuple[Estimate, float]:
    """Two losses of the same rows: most of what one is the other is, too."""
    length, own = random.normal(size=n), random.normal(size=n)
    base = np.exp(0.5 * own)
    tuned = base * np.exp(0.2 * random.normal(size=n))
    found = change(list(tuned), list(base), list(np.exp(heavy * length)), 0.95, 0.0, None)
    return found, (math.exp(0.02) - 1) * math.exp(0.125)


CASES: dict[str, Callable[[np.random.Generator, int], tuple[Estimate, float]]] = {
    "partly right": partly,
    "loss": lambda random, n: lost(random, n, 0.5, 0.0, 0.0),
    "skewed loss": lambda random, n: lost(random, n, 1.0, 0.0, 0.0),
    "weighted loss": lambda random, n: lost(random, n, 0.5, 1.0, 0.0),
    "long rows are hard": lambda random, n: lost(random, n, 0.5, 1.0, 0.7),
    "long rows are easy": lambda random, n: lost(random, n, 0.5, 0.7, -0.7),
    "rare changes": lambda random, n: moved(random, n, 0.02, 0.0),
    "rare falls": lambda random, n: moved(random, n, 0.0, 0.05),
    "both ways": lambda random, n: moved(random, n, 0.1, 0.15),
    "change of loss": lambda random, n: loss_moved(random, n, 0.0),
    "change of weighted loss": lambda random, n: loss_moved(random, n, 0.7),
}


@pytest.mark.parametrize("name", ["partly right", "long rows are hard", "rare falls", "change of weighted loss"])
def test_the_interval_of_any_score_holds_the_truth(name: str) -> None:
    assert coverage(lambda random: CASES[name](random, 40), 300) >= LEAST


@pytest.mark.long
@pytest.mark.parametrize("n", [20, 50, 200, 500])
@pytest.mark.parametrize("name", CASES)
def test_the_interval_of_any_score_holds_the_truth_for_any_number_of_prompts(name: str, n: int) -> None:
    assert coverage(lambda random: CASES[name](random, n), 600) >= LEAST


def test_a_bootstrap_without_the_unseen_prompt_would_not_pass() -> None:
    """The same draws, the ends taken from what was seen: what a loss with heavy rows shows."""

    def seen(random: np.random.Generator) -> tuple[Estimate, float]:
        values, weights = np.exp(0.5 * random.normal(size=40)), np.exp(random.normal(size=40))
        drawn = random.standard_exponential((1000, 40)) * weights
        low, high = np.quantile(drawn @ values / drawn.sum(axis=1), [0.025, 0.975])
        return Estimate(0.0, float(low), float(high)), math.exp(0.125)

    assert coverage(seen, 300) < LEAST


# Pairs


def test_what_both_models_find_hard_does_not_widen_the_change() -> None:
    hard = [0.0, 1.0] * 50
    tuned = [1.0, 1.0, *hard[2:]]
    found = change(tuned, hard, None, 0.95)
    assert found.value == 0.01
    apart = ours(tuned).high - ours(tuned).low
    assert found.high - found.low < apart / 2


@pytest.mark.parametrize("n", [20, 200])
def test_no_difference_seen_is_not_none_possible(n: int) -> None:
    found = change([1.0] * n, [1.0] * n, None, 0.95)
    assert found.value == 0.0
    assert found.high == pytest.approx(1 - 0.025 ** (1 / n), rel=0.15)
    assert found.low == pytest.approx(-found.high)


def test_a_change_is_turned_round_with_its_models() -> None:
    tuned, base = [1.0, 0.0, 1.0, 1.0] * 10, [0.0, 0.0, 1.0, 0.0] * 10
    there, back = change(tuned, base, None, 0.95), change(base, tuned, None, 0.95)
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low))


# Without spread, weights, numbers


def test_values_without_bounds_that_are_all_the_same_have_an_interval() -> None:
    found = estimate([2.0] * 30, None, 0.95, 0.0, None)
    assert found.low < 1.9 < 2.1 < found.high
    found = change([2.0] * 30, [2.0] * 30, None, 0.95, 0.0, None)
    assert found.low < -0.1 < 0.1 < found.high


def test_a_mean_is_weighed() -> None:
    assert estimate([1.0, 0.0], [3.0, 1.0], 0.95).value == 0.75
    assert change([1.0, 0.0], [0.0, 0.0], [3.0, 1.0], 0.95).value == 0.75


@pytest.mark.parametrize(
    ("weights", "effective"),
    [([1, 1, 1, 1], 4.0), ([5, 5], 2.0), ([1, 0, 0], 1.0), ([100, 1], 1.02), ([], 0.0), ([0], 0.0)],
)
def test_heavy_prompts_count_as_few(weights: list[float], effective: float) -> None:
    assert effective_prompts(weights) == pytest.approx(effective, abs=1e-3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_gives_no_figure(wrong: float) -> None:
    scores = Scores(["a", "b"], [1.0, wrong], [1.0, 1.0])
    found = figures(scores, 0.95)
    assert found.change is not None
    assert found.base is not None
    assert all(math.isnan(value) for one in (found.tuned, found.change) for value in (one.value, one.low, one.high))
    assert found.base.value == 1.0


def test_nothing_to_average_is_an_error() -> None:
    for values, weights in (([], None), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="given no prompt with a weight"):
            estimate(values, weights, 0.95)
    with pytest.raises(ValueError, match="given 2 and 1 values"):
        change([1.0, 0.0], [1.0], None, 0.95)


# Figures of a metric


def test_figures_are_those_of_the_parts() -> None:
    tuned, base, weights = [0.2, 0.9, 0.4] * 20, [0.1, 0.5, 0.6] * 20, [1.0, 2.0, 3.0] * 20
    found = figures(Scores([str(i) for i in range(60)], tuned, base, weights), 0.9, 500)
    assert found.n == 60
    assert found.effective == pytest.approx(120**2 / 280)
    assert found.tuned == estimate(tuned, weights, 0.9, 0.0, 1.0, 500)
    assert found.base == estimate(base, weights, 0.9, 0.0, 1.0, 500)
    assert found.change == change(tuned, base, weights, 0.9, 0.0, 1.0, 500)
    alone = figures(Scores(["a"], [1.0]), 0.95)
    assert (alone.base, alone.change) == (None, None)


def test_figures_do_not_depend_on_how_much_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1.0, 0.0, 0.5] * 30
    before = ours(values)
    monkeypatch.setattr(intervals, "_AT_ONCE", 1000)
    after = ours(values)
    assert (after.low, after.high) == pytest.approx((before.low, before.high), abs=1e-12)
    assert ours(values) == after
