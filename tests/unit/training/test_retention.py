"""A7, A17: which checkpoints stay; steps are numbers, the newest and the best never go."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from sftdist.training.retention import AWAITED, Keep, Standing, best_step, to_prune


def test_steps_are_pruned_as_numbers() -> None:
    assert to_prune([9000, 10000, 8000], 10000, Keep(2), Standing()) == [8000]
    assert to_prune([5, 100, 20], 100, Keep(1), Standing()) == [5, 20]


def test_the_step_just_written_stays_and_later_ones_go() -> None:
    """Later steps did not verify when the run resumed; a plain "keep the largest" would remove the new one."""
    assert to_prune([10, 20, 30, 120, 130], 30, Keep(2), Standing()) == [10, 120, 130]
    best = Standing({120: 0.1, 30: 2.0})
    assert to_prune([30, 120], 30, Keep(1), best) == [120], "a best step that does not verify goes, too"


def test_every_hundredth_stays() -> None:
    assert to_prune(range(50, 401, 50), 400, Keep(1, every=100), Standing()) == [50, 150, 250, 350]


def test_the_best_is_the_lowest_on_disk_and_the_earlier_of_equals() -> None:
    losses = {5: 0.1, 10: 2.0, 20: 1.0, 30: 1.0, 40: math.nan, 50: -math.inf}
    assert best_step([10, 20, 30, 40, 50], Standing(losses)) == 20, "5 is not there; the last two have no figure"
    assert to_prune([10, 20, 30, 40, 60], 60, Keep(1), Standing(losses)) == [10, 30, 40]
    assert best_step([40, 60], Standing(losses)) is None


@given(
    st.sets(st.integers(0, 500), min_size=1),
    st.data(),
    st.dictionaries(st.integers(0, 500), st.floats()),
    st.integers(-1, 4),
    st.integers(0, 60),
)
def test_what_stays_is_what_was_promised(
    steps: set[int], data: st.DataObject, losses: dict[int, float], last: int, every: int
) -> None:
    newest = data.draw(st.sampled_from(sorted(steps)))
    gone = to_prune(steps, newest, Keep(last, every), Standing(losses))
    valid = [step for step in sorted(steps) if step <= newest]
    stays = set(steps) - set(gone)
    assert newest in stays
    assert set(valid[-max(1, last) :]) <= stays <= set(valid)
    assert all(step in stays for step in valid if every and step % every == 0)
    assert gone == sorted(gone)
    finite = {step: losses[step] for step in valid if step in losses and math.isfinite(losses[step])}
    assert not finite or min(finite.values()) in {finite[step] for step in stays if step in finite}


def test_the_best_of_a_probe_is_the_highest_where_higher_is_better() -> None:
    values = {10: 0.5, 20: 0.9, 30: 0.9, 40: 0.7, 50: math.inf}
    accuracy = Standing(values, "general.exact_match", higher_is_better=True)
    assert best_step(range(10, 60, 10), accuracy) == 20
    assert to_prune(range(10, 60, 10), 50, Keep(1), accuracy) == [10, 30, 40]


def test_what_a_watch_has_still_to_score_stays_but_not_without_end() -> None:
    waiting = Standing({10: 0.5}, "m", awaited=True)
    assert to_prune([5, 10, 20, 30, 40], 40, Keep(1), waiting) == [5]
    assert to_prune([5, 10, 20, 30, 40], 40, Keep(1), Standing({10: 0.5}, "m")) == [5, 20, 30]
    many = range(1, 101)
    assert to_prune(many, 100, Keep(1), Standing(awaited=True)) == list(range(1, 101 - AWAITED))
