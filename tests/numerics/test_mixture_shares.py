"""X9: the realised share of each source equals its lambda, and steps are a fair sample of the mixture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from sftdist.data.mixture import Cursor, Mixture, SourceTable
from sftdist.data.packing import CostModel
from sftdist.data.plan import Plan
from sftdist.data.steps import PlanSpec

LAMBDAS = np.array([0.6, 0.3, 0.1])
SIZES = (9_000, 20_000, 6_000)
CAPACITY, PACKS, WINDOW = 2048, 4, 4096
COST = CostModel(1e6, attention=((100.0, None),))


def sources() -> list[SourceTable]:
    """Three sources that differ in length and in how much of a row is supervised."""
    found = []
    for s, (size, median, share) in enumerate(zip(SIZES, (150, 90, 60), (0.5, 0.7, 0.2), strict=True)):
        generator = np.random.default_rng([9, s])
        lengths = np.clip(np.rint(generator.lognormal(np.log(median), 0.6, size)), 4, CAPACITY).astype(np.int32)
        targets = np.maximum(1, np.rint(lengths * share * generator.uniform(0.5, 1.5, size)))
        found.append(SourceTable(f"s{s}", lengths, np.minimum(targets, lengths - 1), np.arange(size), LAMBDAS[s]))
    return found


def off_by(tables: list[SourceTable], counted: list[np.ndarray], windows: int = 12) -> Iterator[float]:
    """At the end of each window: how many of the longest conversations the shares are off by.

    `counted[s]` is what the draws are balanced by; the supervised tokens are what is measured.
    """
    mixture = Mixture(
        sizes=[len(t.rows) for t in tables],
        lambdas=LAMBDAS.tolist(),
        masses=[partial(np.take, one) for one in counted],
        seed=1,
        limits=[None] * 3,
    )
    longest = max(float(t.targets[:].max()) for t in tables)
    cursor, supervised = Cursor.start(3), np.zeros(3)
    for _ in range(windows):
        drawn, cursor = mixture.draw(cursor, WINDOW)
        for s, table in enumerate(tables):
            supervised[s] += table.targets[drawn.index[drawn.source == s]].sum()
        yield float(np.abs(supervised - LAMBDAS * supervised.sum()).max() / longest)


def test_shares_are_within_one_conversation_at_each_window_end() -> None:
    tables = sources()
    assert max(off_by(tables, [t.targets[:] for t in tables])) <= 1


@pytest.mark.parametrize("wrong", ["conversations", "tokens"])
def test_drawing_by_conversations_or_tokens_is_rejected(wrong: str) -> None:
    tables = sources()
    counted = [np.ones(len(t.rows)) if wrong == "conversations" else t.lengths[:].astype(float) for t in tables]
    assert min(off_by(tables, counted)) > 20


def step_figures(packs_of_steps: list[list[np.ndarray]], tables: list[SourceTable]) -> tuple[np.ndarray, np.ndarray]:
    """Per step: the share of each source in the supervised tokens, and the mean length.

    A pack is an int array [D, 2] of (source, row).
    """
    shares, lengths = [], []
    for packs in packs_of_steps:
        rows = np.concatenate(packs)
        targets = [tables[s].targets[rows[rows[:, 0] == s, 1]].sum() for s in range(3)]
        shares.append(np.array(targets) / sum(targets))
        lengths.append(sum(tables[s].lengths[rows[rows[:, 0] == s, 1]].sum() for s in range(3)) / len(rows))
    return np.array(shares), np.array(lengths)


def independent_draws(tables: list[SourceTable], steps: int) -> list[list[np.ndarray]]:
    """Conversations drawn at random, the sources so that lambda holds in the mean, one after another into steps."""
    generator = np.random.default_rng(5)
    odds = np.array([lam / t.targets[:].mean() for lam, t in zip(LAMBDAS, tables, strict=True)])
    source = generator.choice(3, steps * 200, p=odds / odds.sum())
    row = np.array([generator.integers(len(tables[s].rows)) for s in source])
    length = np.array([tables[s].lengths[r] for s, r in zip(source, row, strict=True)])
    step = np.cumsum(length) // (CAPACITY * PACKS)
    rows = np.stack([source, row], 1)
    return [[rows[step == number]] for number in range(min(steps, step[-1]))]


def planned(tables: list[SourceTable], steps: int) -> list[list[np.ndarray]]:
    spec = PlanSpec(CAPACITY, packs_per_step=PACKS, window=WINDOW, seed=1, max_steps=steps)
    return [[np.stack([p.source, p.row], 1) for p in step.packs] for step in Plan(tables, spec, COST).steps_from()]


def gathered_by_length(steps: list[list[np.ndarray]], tables: list[SourceTable]) -> list[list[np.ndarray]]:
    """The wrong variant: packs as first fit decreasing leaves them, like lengths together."""
    rows = np.concatenate([pack for packs in steps for pack in packs])
    length = np.array([tables[s].lengths[r] for s, r in rows])
    rows, length = rows[np.argsort(-length, kind="stable")], np.sort(length)[::-1]
    step = np.cumsum(length) // (CAPACITY * PACKS)
    return [[rows[step == number]] for number in range(int(step[-1]))]


def test_steps_vary_no_more_than_independent_draws() -> None:
    tables = sources()
    steps = planned(tables, 250)
    shares, lengths = step_figures(steps, tables)
    random_shares, random_lengths = step_figures(independent_draws(tables, 250), tables)
    assert np.abs(shares.mean(0) - LAMBDAS).max() < 0.005
    assert (shares.std(0) <= random_shares.std(0)).all()
    assert lengths.std() <= random_lengths.std()
    wrong_shares, wrong_lengths = step_figures(gathered_by_length(steps, tables), tables)
    assert wrong_shares.std(0).max() > random_shares.std(0).max()
    assert wrong_lengths.std() > random_lengths.std()


def test_neither_length_nor_source_drifts_over_the_run() -> None:
    tables = sources()
    shares, lengths = step_figures(planned(tables, 250), tables)
    place = np.arange(len(lengths))
    assert abs(np.corrcoef(place, lengths)[0, 1]) < 0.2
    assert max(abs(np.corrcoef(place, shares[:, s])[0, 1]) for s in range(3)) < 0.2
