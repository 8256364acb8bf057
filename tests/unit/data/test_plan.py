"""The plan: nothing lost, nothing twice, the same from any position and for any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.errors import CheckpointError, ConfigError, DataError
from sftdist.data import mixture
from sftdist.data.mixture import SourceTable
from sftdist.data.packing import CostModel
from sftdist.data.permutation import permute
from sftdist.data.plan import Plan
from sftdist.data.steps import LoaderState, PlanSpec, StepPlan
from tests.unit.data.planning import COST, SPEC, conversations, natural, plan, table

SOURCES = [table("a", 300, 0.5), table("b", 200, 0.3, seed=1), table("c", 150, 0.2, seed=2)]

MODES = [
    {},
    {"mix_mode": "loss"},
    {"packing": False, "packs_per_step": 6},
    {"packs_per_step": None, "conversations_per_step": 10},
    {"packs_per_step": None, "conversations_per_step": 10, "packing": False},
    {"loss_weighting": "conversation"},
]


def same(one: StepPlan, other: StepPlan) -> bool:
    return (
        one.step == other.step
        and one.denominator == other.denominator
        and len(one.packs) == len(other.packs)
        and conversations(one) == conversations(other)
    )


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 250), min_size=1, max_size=3),
    packs=st.integers(1, 9),
    window=st.integers(1, 300),
    seed=st.integers(0, 10**6),
)
def test_an_epoch_in_natural_proportion_packs_every_conversation_once(
    sizes: list[int], packs: int, window: int, seed: int
) -> None:
    sources = natural(*[table(f"s{i}", size, 1.0, seed=seed + i) for i, size in enumerate(sizes)])
    made = plan(sources, packs_per_step=packs, window=window, seed=seed)
    steps = list(made.steps_from())
    seen = [pair for step in steps for pair in conversations(step)]
    assert sorted(seen) == [(s, 1000 + i) for s, size in enumerate(sizes) for i in range(size)]
    assert [step.step for step in steps] == list(range(len(steps)))
    assert all(pack.length.sum() <= 64 for step in steps for pack in step.packs)
    assert all(len(pack.length) for step in steps for pack in step.packs)
    totals = made.totals()
    assert totals.tokens == sum(int(t.lengths[:].sum()) for t in sources)
    assert totals.targets == sum(t.total for t in sources)
    assert (totals.steps, totals.conversations) == (len(steps), len(seen))


@pytest.mark.parametrize("mode", MODES)
def test_totals_are_those_of_the_steps(mode: dict) -> None:
    made = plan(SOURCES, epochs=2.3, **mode)
    steps, totals = list(made.steps_from()), made.totals()
    assert totals.steps == len(steps)
    assert totals.packs == sum(len(step.packs) for step in steps)
    assert totals.tokens == sum(int(pack.length.sum()) for step in steps for pack in step.packs)
    assert totals.conversations == sum(len(pack.row) for step in steps for pack in step.packs)
    assert totals.targets == sum(step.targets for step in steps)
    weights = np.array([[share * step.denominator for share in step.shares] for step in steps]).sum(0)
    assert [source.share for source in totals.sources] == pytest.approx(weights / weights.sum())
    assert [source.share for source in totals.sources] == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert sum(step.denominator for step in steps) == pytest.approx(2.3 * made.epoch_targets, rel=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_no_conversation_twice_in_a_pass(mode: dict) -> None:
    # what a pass holds is settled by the draws; packs and windows only permute them, so counts differ by at most one
    made = plan(SOURCES, epochs=3.0, **mode)
    seen = Counter(pair for step in made.steps_from() for pair in conversations(step))
    for s, source in enumerate(SOURCES):
        counts = [seen[(s, row)] for row in source.rows.tolist()]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_resume_at_any_step_equals_the_uninterrupted_run(mode: dict) -> None:
    whole = list(plan(SOURCES, epochs=2.2, **mode).steps_from())
    assert len(whole) > 20
    for place in {0, 1, 7, len(whole) // 2, len(whole) - 2}:
        state = LoaderState.from_json(json.loads(json.dumps(whole[place].after.to_json())))
        rest = list(plan(SOURCES, epochs=2.2, **mode).steps_from(state))
        assert len(rest) == len(whole) - place - 1
        assert all(same(one, other) for one, other in zip(rest, whole[place + 1 :], strict=True))


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    parts=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    packs=st.integers(1, 9),
    window=st.integers(1, 90),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(MODES),
    data=st.data(),
)
def test_planning_from_a_state_is_planning_on(
    sizes: list[int], parts: list[int], packs: int, window: int, seed: int, mode: dict, data: st.DataObject
) -> None:
    """Whatever the sources, in any of several passes, inside a window or between two."""
    sources = [table(f"s{i}", size, float(parts[i]), seed=seed + i) for i, size in enumerate(sizes)]
    changes = {"packs_per_step": packs, "window": window, "seed": seed, "epochs": 3.0, **mode}
    whole = list(plan(sources, **changes).steps_from())
    place = data.draw(st.integers(0, len(whole) - 1))
    state = LoaderState.from_json(json.loads(json.dumps(whole[place].after.to_json())))
    rest = list(plan(sources, **changes).steps_from(state))
    assert len(rest) == len(whole) - place - 1
    assert all(same(one, other) for one, other in zip(rest, whole[place + 1 :], strict=True))


def test_the_end_can_be_resumed_too() -> None:
    made = plan(SOURCES)
    *_, last = made.steps_from()
    assert list(made.steps_from(last.after)) == []


def test_another_seed_is_another_order() -> None:
    one = [conversations(step) for step in plan(SOURCES, epochs=2).steps_from()]
    assert one == [conversations(step) for step in plan(SOURCES, epochs=2).steps_from()]
    assert one != [conversations(step) for step in plan(SOURCES, epochs=2, seed=4).steps_from()]


def orders_of_passes(size: int) -> list[list[int]]:
    """The rows of one source in the order of each of three passes; resumed in the middle of the second."""
    sources = [table("a", size, 1.0)]
    made = plan(sources, epochs=3, packing=False)
    steps = list(islice(made.steps_from(), (size + size // 2) // 4))
    state = LoaderState.from_json(json.loads(json.dumps(steps[-1].after.to_json())))
    steps += plan(sources, epochs=3, packing=False).steps_from(state)
    drawn = [row for step in steps for _, row in conversations(step)]
    return [drawn[start : start + size] for start in range(0, 3 * size, size)]


def test_each_pass_has_an_order_of_its_own_and_a_fixed_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """S21."""
    orders = orders_of_passes(300)
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    monkeypatch.setattr(mixture, "permute", lambda draws, size, key: permute(draws % size, size, key))
    assert len(set(map(tuple, orders_of_passes(300)))) == 1


@settings(max_examples=20, deadline=None)
@given(packs=st.integers(1, 13), seed=st.integers(0, 1000))
def test_the_ranks_share_a_step_whatever_their_number(packs: int, seed: int) -> None:
    step = next(plan(SOURCES, packs_per_step=packs, seed=seed).steps_from())
    for world in range(1, 9):
        ranks = step.deal(world, COST)
        assert {len(rank) for rank in ranks} == {-(-len(step.packs) // world)}
        assert sorted(p for rank in ranks for p in rank if p >= 0) == list(range(len(step.packs)))


def test_steps_have_exactly_their_size() -> None:
    *full, last = plan(SOURCES, packs_per_step=5).steps_from()
    assert {len(step.packs) for step in full} == {5}
    assert 1 <= len(last.packs) <= 5
    *full, last = plan(SOURCES, packs_per_step=None, conversations_per_step=12).steps_from()
    assert {len(conversations(step)) for step in full} == {12}
    assert all(len(step.packs) <= 12 for step in full)
    *full, last = plan(SOURCES, packing=False, packs_per_step=7).steps_from()
    assert {(len(step.packs), len(conversations(step))) for step in full} == {(7, 7)}


def test_a_step_larger_than_the_window_is_filled_from_several() -> None:
    *full, _ = plan(SOURCES, packs_per_step=40, window=16).steps_from()
    assert len(full) > 2
    assert {len(step.packs) for step in full} == {40}


def test_no_conversation_waits_for_ever() -> None:
    for packs, window in ((1, 32), (4, 64), (30, 64), (8, 700)):
        totals = plan(SOURCES, packs_per_step=packs, window=window, max_steps=300, epochs=None).totals()
        assert totals.oldest <= 3


def test_steps_are_well_filled() -> None:
    lengths = np.random.default_rng(0).integers(4, 300, 20_000).astype(np.int32)
    source = SourceTable("a", lengths, np.ones(20_000), np.arange(20_000), 1.0)
    assert Plan([source], replace(SPEC, pack_tokens=2048, window=4096), COST).totals().fill > 0.998


def test_costly_conversations_do_not_open_the_window() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(400), 1, 40_000), 1, 8192).astype(np.int32)
    source = SourceTable("a", lengths, np.ones(40_000), np.arange(40_000), 1.0)
    spec = PlanSpec(8192, packs_per_step=8, window=4096, epochs=1.0)
    places, longest = [], []
    for step in Plan([source], spec, CostModel(48e9, ((1.6e6, None),))).steps_from():
        places.append(step.step - step.after.window.step)
        longest.append(max(int(pack.length.max()) for pack in step.packs))
    assert abs(np.corrcoef(places, longest)[0, 1]) < 0.2


def test_a_window_is_what_was_asked_for_and_many_small_steps_by_default() -> None:
    def first_window(window: int | None) -> int:
        """Its steps: all but the last leave a position inside of it."""
        steps = islice(plan(SOURCES, window=window, epochs=90.0).steps_from(), 400)
        return 1 + sum(step.after.window.step == 0 for step in steps)

    assert first_window(64) < 32
    assert first_window(None) >= 32


def test_max_steps_and_epochs_whichever_comes_first() -> None:
    assert plan(SOURCES, max_steps=7, epochs=None).totals().steps == 7
    assert plan(SOURCES, max_steps=7, epochs=50).totals().steps == 7
    one = plan(SOURCES).totals().steps
    assert plan(SOURCES, max_steps=10_000).totals().steps == one
    first = [conversations(step) for step in plan(SOURCES, max_steps=7, epochs=None).steps_from()]
    assert first == [conversations(step) for step in islice(plan(SOURCES, max_steps=9, epochs=None).steps_from(), 7)]


def test_too_many_passes_are_refused_with_the_steps_that_fit() -> None:
    small = [table("big", 1000, 0.5), table("small", 40, 0.5, max_passes=3.0)]
    with pytest.raises(ConfigError, match=r"source small .* max_passes=3 times; (\d+) steps fit") as caught:
        plan(small).totals()
    fits = int(str(caught.value).split("train.max_steps=")[1].split(",")[0])
    totals = plan(small, max_steps=fits).totals()
    assert totals.steps == fits
    assert totals.sources[1].passes <= 3
    with pytest.raises(ConfigError, match="small"):
        plan(small, max_steps=fits + 1).totals()
    with pytest.raises(ConfigError, match="small"):
        list(plan(small).steps_from())


def test_loss_mode_draws_in_natural_proportion_and_weighs_to_lambda() -> None:
    made = plan(SOURCES, mix_mode="loss")
    totals = made.totals()
    assert [source.passes for source in totals.sources] == [1, 1, 1]
    total = sum(t.total for t in SOURCES)
    step = next(made.steps_from())
    for pack in step.packs:
        expected = [SOURCES[s].lam / (SOURCES[s].total / total) for s in pack.source]
        assert pack.scale == pytest.approx(expected)
    assert step.denominator == pytest.approx(sum(float((p.scale * p.targets).sum()) for p in step.packs))


def test_conversations_weigh_the_same() -> None:
    made = plan(SOURCES, loss_weighting="conversation")
    step = next(made.steps_from())
    weights = np.concatenate([pack.scale * pack.targets for pack in step.packs])
    assert weights == pytest.approx(np.full(len(weights), weights[0]))
    assert weights[0] == pytest.approx(sum(t.total for t in SOURCES) / sum(len(t.rows) for t in SOURCES))


def test_empty_sources_and_impossible_values_are_refused() -> None:
    empty = table("void", 0, 0.2)
    with pytest.raises(DataError, match=r"source void: lambda 0\.2 but no conversation"):
        plan([SOURCES[0], empty])
    assert plan([SOURCES[0], replace(empty, lam=0.0)]).totals().sources[1].conversations == 0
    with pytest.raises(ConfigError, match="no source has a lambda"):
        plan([replace(SOURCES[0], lam=0.0)])
    with pytest.raises(ConfigError) as caught:
        plan(SOURCES, packs_per_step=4, conversations_per_step=4, epochs=None, mix_mode="both", window=0)
    assert len(caught.value.issues) == 4
    with pytest.raises(ConfigError, match=r"a conversation has \d+ tokens, a pack holds 32"):
        plan(SOURCES, pack_tokens=32).totals()


def test_fingerprint_and_state_belong_to_one_plan() -> None:
    one = plan(SOURCES)
    assert one.fingerprint == plan(SOURCES).fingerprint
    changed = [plan(SOURCES, seed=9), plan(SOURCES, pack_tokens=65), plan([replace(SOURCES[0], lam=0.4), *SOURCES[1:]])]
    changed.append(plan([replace(SOURCES[0], lengths=SOURCES[0].lengths[::-1].copy()), *SOURCES[1:]]))
    assert len({one.fingerprint, *(other.fingerprint for other in changed)}) == 5
    state = next(one.steps_from()).after
    with pytest.raises(CheckpointError, match="was saved for plan"):
        next(changed[0].steps_from(state))
    with pytest.raises(CheckpointError, match="version 3"):
        LoaderState.from_json({**state.to_json(), "version": 3})
