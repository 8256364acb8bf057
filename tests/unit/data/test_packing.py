"""Packs and ranks: capacity, fill, equal cost, fair steps, and nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.data import packing
from sftdist.data.packing import CostModel, deal, pack_grid

LLAMA_8B = CostModel(48e9, attention=((2 * 786432.0, None),))
QWEN_05B = CostModel(3e9, attention=((258048.0, None),))


def lognormal(number: int, seed: int = 0, cap: int = 8192) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.clip(np.rint(generator.lognormal(np.log(400), 1.0, number)), 1, cap).astype(np.int64)


def test_cost_counts_causal_pairs_and_windows() -> None:
    cost = CostModel(10.0, attention=((1.0, None), (2.0, 3)))
    # 5 tokens see 1 2 3 4 5 keys, with a window of 3: 1 2 3 3 3
    assert cost.of(np.array([5])).tolist() == [50 + 15 + 2 * 12]
    assert cost.of(np.array([2])).tolist() == [20 + 3 + 2 * 3]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=150),
    steps=st.integers(1, 4),
    slots=st.integers(1, 6),
    sources=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_packs_hold_at_most_their_capacity(lengths: list[int], steps: int, slots: int, sources: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    length = np.array(lengths)
    pack = pack_grid(
        length,
        64,
        steps,
        slots,
        attention=LLAMA_8B.attention_of(length),
        source=generator.integers(0, sources, len(length)),
        mass=length * 0.5,
        age=generator.integers(0, 4, len(length)),
        seed=seed,
    )
    assert pack.min() >= -1
    assert pack.max() < steps * slots
    used = np.bincount(pack[pack >= 0], length[pack >= 0], steps * slots)
    assert used.max() <= 64
    left = length[pack < 0]
    candidates = np.add.accumulate(length) <= 64 * steps * slots
    assert not len(left) or left.min() > 64 - used.max() or not candidates.all()


def test_whatever_fits_is_packed() -> None:
    assert (pack_grid(np.array([3, 3, 2, 2, 2]), 6, 1, 2) >= 0).all()
    assert (pack_grid(np.array([64] * 5), 64, 1, 5) >= 0).all()
    assert sorted(pack_grid(np.array([5, 4, 6]), 6, 3, 1)) == [0, 1, 2]


def test_fill_and_fair_steps_on_long_tailed_lengths() -> None:
    length = lognormal(4096)
    generator = np.random.default_rng(1)
    source = generator.choice(3, len(length), p=[0.5, 0.3, 0.2])
    steps, slots = int(length.sum() * 0.97) // (8 * 8192), 8
    pack = pack_grid(
        length, 8192, steps, slots, attention=LLAMA_8B.attention_of(length), source=source, mass=length * 0.4
    )
    placed = pack >= 0
    assert length[placed].sum() / (steps * slots * 8192) > 0.999
    cost = np.bincount(pack[placed], LLAMA_8B.of(length[placed]), steps * slots).reshape(steps, slots)
    assert (cost.mean(1) / cost.max(1)).mean() > 0.97
    step = pack[placed] // slots
    means = np.bincount(step, length[placed]) / np.bincount(step)
    drawn = [generator.choice(length, len(length[placed]) // steps).mean() for _ in range(400)]
    assert means.std() < np.std(drawn)


def balance(cost: CostModel, lengths: np.ndarray, capacity: int, ranks: int, each: int, steps: int) -> list[float]:
    """Mean over maximum of the ranks' costs in each step of a grid."""
    attention = cost.attention_of(lengths)
    pack = pack_grid(lengths, capacity, steps, ranks * each, attention=attention, dense=cost.dense, seed=1)
    placed = pack >= 0
    weights = cost.of(lengths)[placed]
    costs = np.bincount(pack[placed], weights, steps * ranks * each).astype(np.float64).reshape(steps, -1)
    loads = [step[deal(step, ranks)].sum(1) for step in costs]
    return [float(load.mean() / load.max()) for load in loads]


@pytest.mark.parametrize("cost", [LLAMA_8B, QWEN_05B], ids=["8B", "0.5B"])
@pytest.mark.parametrize(("capacity", "ranks"), [(8192, 8), (8192, 64), (32_768, 8), (32_768, 64)])
def test_a_rank_with_four_packs_does_not_wait(
    cost: CostModel, capacity: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With long documents among the others no rank is more than 2 % behind the mean; packs that are merely filled
    alike leave one further behind at 64 ranks, where a step holds documents that cost more than a whole other pack."""
    steps = 2
    bulk = lognormal(int(steps * ranks * 4 * capacity / 600), cap=capacity // 4)
    lengths = np.random.default_rng(5).permutation(np.concatenate([bulk, np.full(steps * ranks // 4, capacity)]))
    found = min(balance(cost, lengths, capacity, ranks, 4, steps))
    assert found > 0.98
    if ranks == 64:
        monkeypatch.setattr(packing._Grid, "_relieve", lambda grid, *given: None)
        assert min(balance(cost, lengths, capacity, ranks, 4, steps)) < found - 0.01


def test_a_rank_with_one_pack_waits_for_documents_and_not_for_packs() -> None:
    steps, ranks = 64, 8
    lengths = lognormal(steps * ranks * 14)
    assert np.mean(balance(LLAMA_8B, lengths, 8192, ranks, 1, steps)) > 0.98
    assert np.mean(balance(QWEN_05B, lengths, 8192, ranks, 1, steps)) > 0.96


def test_documents_that_waited_are_placed_first() -> None:
    lengths = np.array([5, 6, 6, 3])  # 6 and 6 leave no room for 5
    assert pack_grid(lengths, 10, 1, 2)[0] == -1
    assert pack_grid(lengths, 10, 1, 2, age=np.array([2, 0, 0, 0]))[0] >= 0


@settings(max_examples=80, deadline=None)
@given(costs=st.lists(st.floats(1, 100), min_size=1, max_size=70), world=st.integers(1, 8))
def test_every_rank_gets_equally_many_packs_and_every_pack_has_one_rank(costs: list[float], world: int) -> None:
    ranks = deal(costs, world)
    assert ranks.shape == (world, -(-len(costs) // world))
    dealt = ranks[ranks >= 0]
    assert sorted(dealt.tolist()) == list(range(len(costs)))
    assert (ranks < 0).sum() == ranks.size - len(costs)


def test_cost_is_dealt_evenly() -> None:
    costs = np.array([10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
    assert costs[deal(costs, 2)].sum(1).tolist() == [26.0, 26.0]
    generator = np.random.default_rng(0)
    costs = generator.lognormal(0, 0.05, 32)
    loads = costs[deal(costs, 8)].sum(1)
    plain = costs.reshape(8, 4).sum(1)
    assert loads.mean() / loads.max() > 0.99 > plain.mean() / plain.max()


def test_micro_batches_that_meet_are_alike() -> None:
    """Unpacked conversations: ranks that wait for each other at every micro-batch lose little."""
    generator = np.random.default_rng(0)
    costs = generator.exponential(1.0, 64)
    together, anyhow = costs[deal(costs, 4)], generator.permutation(costs).reshape(4, 16)
    assert (np.diff(together, axis=1) <= 0).all()
    assert together.mean(0).sum() / together.max(0).sum() > 0.8 > 0.6 > anyhow.mean(0).sum() / anyhow.max(0).sum()


def test_equal_costs_stay_in_order() -> None:
    assert deal([1.0] * 4, 4).ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("world", [3, 16])
def test_fewer_packs_than_ranks_leave_empty_ones(world: int) -> None:
    assert (deal([1.0, 2.0], world) < 0).sum() == world - 2
