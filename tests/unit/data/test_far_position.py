"""A6: step 1,000,000 of a source of 10^8 rows is planned as fast as step 10, in a memory that the rows do not fill."""

from __future__ import annotations

import json
import time
import tracemalloc
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import pytest

from sftdist.data.fitting import fit
from sftdist.data.loader import Loader
from sftdist.data.mixture import Cursor, SourceTable
from sftdist.data.packing import CostModel
from sftdist.data.plan import Plan
from sftdist.data.steps import LoaderState, PlanSpec, WindowState
from tests.unit.data.planning import conversations

ROWS = 2 * 400 * 746 * 168  # more than 10^8, and a multiple of both periods below
PASS = 4  # the far position is that many passes on: about a million steps
SPEC = PlanSpec(8192, packs_per_step=32, epochs=10.0)
COST = CostModel(1.0, ((1.0, None),))
SECONDS = 2.0


@dataclass(frozen=True)
class Computed:
    """A column of `ROWS` rows that nobody has to store."""

    period: int
    least: int
    stride: int = 7919

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.least + index * self.stride % self.period

    @property
    def total(self) -> float:
        """The sum over all rows: each value of a period occurs equally often."""
        return ROWS * (self.least + (self.period - 1) / 2)


LENGTHS, TARGETS = Computed(746, 500), Computed(400, 1)


class ComputedStore:
    """The token store of such a source: the last tokens of a row are supervised."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        length, targets = (int(column[np.array(row)]) for column in (LENGTHS, TARGETS))
        weights = np.zeros(length, np.float32)
        weights[length - targets :] = 1
        return np.arange(length, dtype=np.int32), weights

    def row_ids(self, rows: np.ndarray) -> list[str]:
        return [str(row) for row in rows]


STORES = [ComputedStore("a"), ComputedStore("b")]


def huge_plan() -> Plan:
    lengths, targets, rows = (cast(Any, column) for column in (LENGTHS, TARGETS, Computed(ROWS, 0, 1)))
    return Plan(
        [
            SourceTable(name, lengths, targets, rows, lam, key=name, total_targets=TARGETS.total, max_passes=20.0)
            for name, lam in (("a", 0.6), ("b", 0.4))
        ],
        SPEC,
        COST,
    )


def far_state() -> dict[str, Any]:
    """After whole passes each source's mass is known, so the mixture stands exactly there; then on by 40 steps.

    `a` has lambda 0.6: where it was seen six times, `b` was four times.
    """
    plan = huge_plan()
    cursor = Cursor((6 * ROWS, 4 * ROWS), (6 * TARGETS.total, 4 * TARGETS.total))
    window = replace(WindowState.start(2), step=999_960, cursor=cursor)
    *_, last = islice(plan.steps_from(LoaderState(999_960, window, plan.fingerprint)), 40)
    return last.after.to_json()


def seconds_to_first_step(state: dict[str, Any]) -> tuple[float, int]:
    """From nothing to the batches of the next step, as a program that resumes does it; and the step's number."""
    text = json.dumps(state)
    started = time.perf_counter()
    with Loader(huge_plan(), STORES, state=json.loads(text)) as loader:
        step = loader.take()
        return time.perf_counter() - started, step.step


def test_a_far_step_is_planned_as_fast_as_an_early_one() -> None:
    *_, tenth = islice(huge_plan().steps_from(), 10)
    early, far = tenth.after.to_json(), far_state()
    times = [(seconds_to_first_step(early), seconds_to_first_step(far)) for _ in range(3)]
    assert {(one[1], other[1]) for one, other in times} == {(10, 1_000_000)}
    quickest_early, quickest_far = (min(seconds) for seconds in zip(*[(a[0], b[0]) for a, b in times], strict=True))
    assert quickest_far < SECONDS
    assert quickest_far < 5 * quickest_early + 0.1


def test_counting_through_the_steps_is_too_slow() -> None:
    """The wrong way, which others take: a million steps are not planned in two seconds."""
    plan, started = huge_plan(), time.perf_counter()
    planned = sum(1 for _ in zip(range(300), plan.steps_from(), strict=False))
    assert (time.perf_counter() - started) / planned * 1_000_000 > 10 * SECONDS


def test_the_far_position_is_a_true_one() -> None:
    """In later passes, with conversations carried over; planning from it is planning on; X9 holds there."""
    state = LoaderState.from_json(far_state())
    assert all(drawn % ROWS for drawn in state.window.cursor.drawn)
    assert [drawn // ROWS for drawn in state.window.cursor.drawn] == [6, 4]
    assert len(state.window.index)
    steps = list(islice(huge_plan().steps_from(state), 60))
    middle = LoaderState.from_json(steps[29].after.to_json())
    again = list(islice(huge_plan().steps_from(middle), 30))
    assert [conversations(step) for step in again] == [conversations(step) for step in steps[30:]]
    mass = np.array(steps[-1].after.window.cursor.mass)
    assert np.abs(mass - np.array([0.6, 0.4]) * mass.sum()).max() <= 400


@pytest.mark.parametrize("rows", [10**7, pytest.param(10**8, marks=pytest.mark.long)])
def test_a_source_is_opened_in_a_few_bytes_a_row(rows: int) -> None:
    """Row numbers of four bytes; copies of the columns would take twenty and more."""
    lengths, targets = np.broadcast_to(np.int32(700), rows), np.broadcast_to(np.float64(300), rows)
    chosen = np.arange(rows, dtype=np.uint8) > 5
    tracemalloc.start()
    fitted = fit(lengths, targets, 8192, "drop", chosen=chosen)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fitted.kept.rows == int(chosen.sum())
    assert held < 4.2 * rows
    assert peak < 8.2 * rows + 150e6  # the parts beside the whole, and one block
