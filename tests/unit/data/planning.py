"""Source tables, specs and stores in memory for the tests of plan and loader."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sftdist.data.mixture import SourceTable
from sftdist.data.packing import CostModel
from sftdist.data.plan import Plan
from sftdist.data.steps import PlanSpec, StepPlan

COST = CostModel(1000.0, attention=((1.0, None),))
SPEC = PlanSpec(pack_tokens=64, packs_per_step=4, window=128, seed=3, epochs=1.0)


def table(name: str, size: int, lam: float, *, seed: int = 0, longest: int = 64, **fields: Any) -> SourceTable:
    """A source of random lengths; half of the tokens of a row are supervised."""
    lengths = np.random.default_rng([seed, size]).integers(2, longest + 1, size).astype(np.int32)
    return SourceTable(name, lengths, np.floor(lengths / 2.0), np.arange(size) + 1000, lam, **fields)


def natural(*tables: SourceTable) -> list[SourceTable]:
    """The same sources with the lambdas that they have by size."""
    return [replace(one, lam=one.total / sum(t.total for t in tables)) for one in tables]


def plan(tables: list[SourceTable], **changes: Any) -> Plan:
    return Plan(tables, replace(SPEC, **changes), COST)


def conversations(step: StepPlan) -> list[tuple[int, int]]:
    """(source, row) of a step in the order of its packs."""
    return [pair for pack in step.packs for pair in zip(pack.source.tolist(), pack.row.tolist(), strict=True)]


@dataclass
class MemoryStore:
    """A token store in memory, made to fit a table: the second half of a row is supervised."""

    table: SourceTable
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.table.name

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        place = row - 1000
        length, targets = int(self.table.lengths[:][place]), int(self.table.targets[:][place] / self.weight)
        weights = np.zeros(length, np.float32)
        weights[length - targets :] = self.weight
        return (np.arange(length) + row * 7).astype(np.int32) % 997, weights

    def row_ids(self, rows: np.ndarray) -> list[str]:
        return [f"r{row}" for row in rows]
