"""What `data.max_len` leaves: counted, looked up, block by block the same as at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.errors import DataError
from sftdist.data import fitting
from sftdist.data.fitting import Amount, Fitted, fit

LENGTHS = np.array([4, 10, 12, 3, 20], np.int32)
TARGETS = np.array([2.0, 5.0, 6.0, 0.0, 1.0])


def test_overlong_is_dropped_by_default_and_counted() -> None:
    fitted = fit(LENGTHS, TARGETS, 10, "drop")
    assert fitted.rows.tolist() == [0, 1]
    assert fitted.kept == Amount(2, 14, 7.0)
    assert fitted.dropped == Amount(3, 35, 7.0)
    assert fitted.truncated == Amount()


def test_truncation_keeps_the_first_tokens_and_drops_rows_that_lose_all_targets() -> None:
    fitted = fit(LENGTHS, TARGETS, 10, "truncate", kept_targets=lambda rows: np.where(rows == 2, 4.0, 0.0))
    assert fitted.rows.tolist() == [0, 1, 2]
    assert fitted.lengths[:].tolist() == [4, 10, 10]
    assert fitted.targets[:].tolist() == [2.0, 5.0, 4.0]
    assert fitted.kept == Amount(3, 24, 11.0)
    assert fitted.dropped == Amount(2, 23, 1.0)
    assert fitted.truncated == Amount(1, 2, 2.0)


def test_overlong_error_says_how_many_and_what_to_change() -> None:
    with pytest.raises(DataError, match=r"general: 2 conversations with 7 supervised .* data.max_len=10 .* 20 tokens"):
        fit(LENGTHS, TARGETS, 10, "error", name="general")
    assert fit(LENGTHS, TARGETS, 20, "error").rows.tolist() == [0, 1, 2, 4]


def test_only_the_rows_of_the_split_are_considered() -> None:
    chosen = np.array([False, True, False, True, False])
    assert fit(LENGTHS, TARGETS, 12, "drop", chosen=chosen).rows.tolist() == [1]
    assert fit(LENGTHS, TARGETS, 12, "drop", chosen=np.zeros(5, bool)).kept == Amount()


def lost_tail(rows: np.ndarray) -> np.ndarray:
    """What is left of the targets of cut rows: nothing of every third."""
    return np.where(rows % 3 == 0, 0.0, 1.0 + rows % 5)


def in_one_go(lengths: np.ndarray, targets: np.ndarray, max_len: int, policy: str, chosen: np.ndarray) -> list[tuple]:
    """The same in plain Python: (row, length, targets) of what is kept."""
    kept = []
    for row in np.flatnonzero(chosen).tolist():
        length, target = int(lengths[row]), float(targets[row])
        if length > max_len:
            target = float(lost_tail(np.array([row]))[0]) if policy == "truncate" else 0.0
        if target > 0:
            kept.append((row, min(length, max_len), target))
    return kept


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    seed=st.integers(0, 1000),
    block=st.integers(1, 70),
    policy=st.sampled_from(["drop", "truncate"]),
)
def test_blocks_give_what_the_whole_gives(size: int, seed: int, block: int, policy: str) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 30, size).astype(np.int32)
    targets = generator.integers(0, 9, size).astype(float)
    chosen = generator.random(size) < 0.8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "BLOCK", block)
        fitted = fit(lengths, targets, 20, policy, chosen=chosen, kept_targets=lost_tail)
        longest = fitted.longest(5)
    expected = in_one_go(lengths, targets, 20, policy, chosen)
    found = zip(fitted.rows.tolist(), fitted.lengths[:].tolist(), fitted.targets[:].tolist(), strict=True)
    assert list(found) == expected
    assert fitted.kept == amount_of(fitted)
    assert fitted.kept.rows + fitted.dropped.rows == int(chosen.sum())
    total = fitted.kept.tokens + fitted.dropped.tokens + fitted.truncated.tokens
    assert total == int(lengths[chosen].sum())
    assert fitted.lengths[longest].tolist() == sorted((length for _, length, _ in expected), reverse=True)[:5]


def amount_of(fitted: Fitted) -> Amount:
    return Amount(len(fitted.rows), int(fitted.lengths[:].sum()), float(fitted.targets[:].sum()))


def test_a_place_is_looked_up_like_the_whole_column() -> None:
    fitted = fit(LENGTHS, TARGETS, 10, "truncate", kept_targets=lambda rows: np.full(len(rows), 0.5))
    places = np.array([3, 0, 2, 2])
    assert fitted.lengths[places].tolist() == fitted.lengths[:][places].tolist() == [10, 4, 10, 10]
    assert fitted.targets[places].tolist() == fitted.targets[:][places].tolist() == [0.5, 2.0, 0.5, 0.5]
