"""The order of the draws: permutations per pass, exact shares and passes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.errors import ConfigError, DataError
from sftdist.data.mixture import Cursor, Drawn, Mixture, resolve_lambdas
from sftdist.data.permutation import key64, permute, shuffled


def mixture(
    masses: list[np.ndarray],
    lambdas: list[float],
    *,
    seed: int = 0,
    limits: list[int | None] | None = None,
    horizon: float | None = None,
) -> Mixture:
    return Mixture(
        sizes=[len(mass) for mass in masses],
        lambdas=lambdas,
        masses=[partial(np.take, mass) for mass in masses],
        seed=seed,
        limits=limits or [None] * len(masses),
        horizon=horizon,
        names=[f"s{s}" for s in range(len(masses))],
    )


def windows(mix: Mixture, size: int, number: int) -> list[tuple[Drawn, Cursor]]:
    cursor, found = Cursor.start(len(mix.sizes)), []
    for _ in range(number):
        drawn, cursor = mix.draw(cursor, size)
        found.append((drawn, cursor))
        if drawn.end:
            break
    return found


def order(mix: Mixture, size: int, number: int) -> list[tuple[int, int]]:
    found = windows(mix, size, number)
    return [pair for drawn, _ in found for pair in zip(drawn.source.tolist(), drawn.index.tolist(), strict=True)]


def some_masses(seed: int, sizes: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 500, size).astype(float) for size in sizes]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), first=st.integers(0, 10**6))
def test_a_pass_is_a_permutation(size: int, seed: int, first: int) -> None:
    draws = np.arange(first * size, (first + 1) * size)
    assert np.array_equal(np.sort(permute(draws, size, seed)), np.arange(size))


def test_passes_seeds_and_sources_have_their_own_order() -> None:
    one = permute(np.arange(2000), 1000, key64(0, 0))
    assert not np.array_equal(one[:1000], one[1000:])
    assert not np.array_equal(one, permute(np.arange(2000), 1000, key64(0, 1)))
    assert not np.array_equal(one, permute(np.arange(2000), 1000, key64(1, 0)))
    assert np.array_equal(one, permute(np.arange(2000), 1000, key64(0, 0)))


def test_every_order_of_a_tiny_source_occurs_about_equally_often() -> None:
    passes = permute(np.arange(4 * 12_000), 4, 11).reshape(-1, 4)
    counts = np.array(list(Counter(map(tuple, passes.tolist())).values()))
    assert len(counts) == 24
    chi_square = float(((counts - 500) ** 2 / 500).sum())
    assert chi_square < 60  # 23 degrees of freedom: p = 0.00004


def test_places_in_a_large_source_are_not_correlated() -> None:
    rows = permute(np.arange(20_000), 10**8, 5)
    assert len(np.unique(rows)) == 20_000
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03
    assert np.histogram(rows, bins=20, range=(0, 10**8))[0].min() > 850


def test_shuffled_is_a_permutation_that_depends_on_the_key() -> None:
    assert sorted(shuffled(50, 3)) == list(range(50))
    assert not np.array_equal(shuffled(50, 3), shuffled(50, 4))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    parts=st.lists(st.integers(1, 20), min_size=5, max_size=5),
    window=st.integers(64, 600),
    seed=st.integers(0, 10**6),
)
def test_shares_are_exact_at_the_end_of_each_window(sizes: list[int], parts: list[int], window: int, seed: int) -> None:
    lambdas = np.array(parts[: len(sizes)]) / sum(parts[: len(sizes)])
    masses = some_masses(seed, sizes)
    largest = max(mass.max() for mass in masses)
    for _, cursor in windows(mixture(masses, lambdas.tolist(), seed=seed), window, 8):
        off = np.abs(np.array(cursor.mass) - lambdas * sum(cursor.mass))
        assert off.max() <= largest


def test_no_repeat_within_a_pass_and_equal_passes() -> None:
    masses = some_masses(1, [90, 400])
    drawn = order(mixture(masses, [0.5, 0.5]), 256, 20)
    for source, size in enumerate((90, 400)):
        rows = [index for s, index in drawn if s == source]
        for first in range(0, len(rows) - size, size):
            assert sorted(rows[first : first + size]) == list(range(size))


def test_the_order_does_not_depend_on_the_window() -> None:
    masses = some_masses(2, [120, 300, 77])
    small = order(mixture(masses, [0.2, 0.5, 0.3]), 64, 40)
    large = order(mixture(masses, [0.2, 0.5, 0.3]), 1000, 2)
    assert small[: len(large)] == large[: len(small)]
    assert order(mixture(masses, [0.2, 0.5, 0.3], seed=1), 64, 40) != small


def test_a_window_can_be_drawn_from_its_cursor_alone() -> None:
    masses = some_masses(3, [50, 60])
    whole = windows(mixture(masses, [0.7, 0.3]), 100, 6)
    for (_, before), (expected, after) in pairwise(whole):
        drawn, cursor = mixture(masses, [0.7, 0.3]).draw(before, 100)
        assert cursor == after
        assert np.array_equal(drawn.index, expected.index)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_an_epoch_in_natural_proportion_holds_every_conversation_once(sizes: list[int], seed: int) -> None:
    masses = some_masses(seed, sizes)
    totals = [float(mass.sum()) for mass in masses]
    natural = [total / sum(totals) for total in totals]
    drawn = order(mixture(masses, natural, seed=seed, horizon=sum(totals)), 100, 10**6)
    assert sorted(drawn) == [(s, i) for s, size in enumerate(sizes) for i in range(size)]


def test_a_source_without_lambda_is_never_drawn() -> None:
    drawn = order(mixture(some_masses(0, [10, 10]), [0.0, 1.0]), 64, 3)
    assert {source for source, _ in drawn} == {1}


def test_the_draws_end_with_the_source_that_may_not_be_seen_again() -> None:
    found = windows(mixture(some_masses(0, [10, 500]), [0.5, 0.5], limits=[20, None]), 64, 100)
    assert found[-1][0].end == "s0"
    assert found[-1][1].drawn[0] == 20


def test_rows_without_a_target_are_refused() -> None:
    with pytest.raises(DataError, match="without a supervised token"):
        mixture([np.array([3.0, 0.0])], [1.0]).draw(Cursor.start(1), 64)


def test_lambdas() -> None:
    assert resolve_lambdas([1, 3], [3, 1]) == [0.75, 0.25]
    assert resolve_lambdas([100, 300], [None, None]) == [0.25, 0.75]
    assert resolve_lambdas([100, 300, 5], [None, None, 0.2]) == pytest.approx([0.2, 0.6, 0.2])
    assert resolve_lambdas([1, 16], [None, None], temperature=2) == pytest.approx([0.2, 0.8])
    for given_lambdas in ([-0.1, 1.1], [0.0, 0.0], [1.0, None]):
        with pytest.raises(ConfigError):
            resolve_lambdas([1, 1], given_lambdas)
