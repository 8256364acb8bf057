"""Sources + lambdas + pack size -> the packs of every optimizer step, on any number of ranks.

The plan is made of lengths and supervised counts alone. It goes window by window: draw some
thousand conversations in mixture order, pack them, carry what stays behind over to the next
window. A position is a step number and the state at the start of its window (a few integers per
source and the conversations carried over), so any step can be planned without the steps before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import CheckpointError, ConfigError, DataError
from sftdist.data.mixture import Floats, Ints, Mixture, SourceTable
from sftdist.data.packing import SMALL_STEP, CostModel, pack_grid
from sftdist.data.permutation import key64, shuffled
from sftdist.data.steps import (
    STATE_VERSION,
    LoaderState,
    Pack,
    PlanSpec,
    PlanTotals,
    SourceTotals,
    StepPlan,
    WindowState,
)
from sftdist.data.window import Conversations, Window

WINDOW = 4096  # conversations planned at a time, where the spec names no number
SMALL_STEPS = 32  # of at most SMALL_STEP packs: so many are planned together
SPARE = 0.03  # of a window's tokens stay behind, so that packs can be closed exactly (fill 99.9 %)


class Plan:
    """The plan of a run: a pure function of tables, spec and cost, the same on every rank."""

    def __init__(self, tables: Sequence[SourceTable], spec: PlanSpec, cost: CostModel) -> None:
        """Raises ConfigError for impossible values and DataError for an empty source with a lambda."""
        issues = spec.issues()
        if not any(table.lam > 0 for table in tables):
            issues.append("no source has a lambda above 0: give at least one source a lambda")
        issues += [f"source {t.name}: lambda {t.lam}; 0 or more is required" for t in tables if t.lam < 0]
        if issues:
            raise ConfigError(issues)
        for table in tables:
            if table.lam > 0 and not len(table.rows):
                raise DataError(
                    f"source {table.name}: lambda {table.lam:g} but no conversation to train on: "
                    "check its path and the data report, or set its lambda to 0"
                )
        self.tables, self.spec, self.cost = list(tables), spec, cost
        lam = [table.lam for table in tables]
        self.lambdas = [one / sum(lam) for one in lam]
        self._mixture = self._make_mixture()

    def _make_mixture(self) -> Mixture:
        spec = self.spec
        drawn = self._natural if spec.mix_mode == "loss" else self.lambdas
        return Mixture(
            sizes=[len(table.rows) for table in self.tables],
            lambdas=drawn,
            masses=[partial(self._mass, s) for s in range(len(self.tables))],
            seed=spec.seed,
            limits=[None if t.max_passes is None else int(t.max_passes * len(t.rows)) for t in self.tables],
            horizon=None if spec.epochs is None else spec.epochs * self.epoch_targets,
            names=[table.name for table in self.tables],
        )

    @cached_property
    def epoch_targets(self) -> float:
        """Supervised tokens in one epoch: those of the sources that are drawn."""
        return sum(table.total for table in self.tables if table.lam > 0)

    @cached_property
    def _typical_targets(self) -> float:
        """Supervised tokens per conversation: with loss_weighting=conversation the weight of each."""
        return self.epoch_targets / sum(len(table.rows) for table in self.tables if table.lam > 0)

    @cached_property
    def _natural(self) -> list[float]:
        """The share of each drawn source in the weighted targets of one epoch."""
        per_source = [
            0.0 if t.lam == 0 else t.total if self.spec.loss_weighting == "token" else float(len(t.rows))
            for t in self.tables
        ]
        return [one / sum(per_source) for one in per_source]

    def _mass(self, source: int, index: Ints) -> Floats:
        """Weight over targets of rows, as the mixture counts it."""
        targets = np.asarray(self.tables[source].targets[index], np.float64)
        if self.spec.loss_weighting == "token":
            return targets
        return np.where(targets > 0, self._typical_targets, 0.0)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that the plan depends on."""
        digest = hashlib.sha256()
        sources = []
        for table in self.tables:
            if not table.key:
                for column in (table.lengths, table.targets, table.rows):
                    digest.update(np.ascontiguousarray(column[:]).data)
            sources.append([table.name, table.key, len(table.rows), table.lam, table.max_passes])
        text = json.dumps([STATE_VERSION, sources, asdict(self.spec), asdict(self.cost)], sort_keys=True)
        digest.update(text.encode())
        return digest.hexdigest()

    def start(self) -> LoaderState:
        """The position before the first step."""
        return LoaderState(0, WindowState.start(len(self.tables)), self.fingerprint)

    def steps_from(self, state: LoaderState | None = None) -> Iterator[StepPlan]:
        """The steps from a position on. Raises CheckpointError when the state belongs to another plan,
        ConfigError when a source runs out of passes."""
        state = self.start() if state is None else state
        if state.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"the data position was saved for plan {state.fingerprint[:12]}, this plan is {self.fingerprint[:12]}: "
                "resume with the same data, mixture, pack and step settings and seed"
            )
        for start, window, steps in self._windows(state.window):
            skipped = max(0, state.step - start.step)
            for number, packs in enumerate(window.packs(skipped, steps), start.step + skipped):
                yield self._step(start, packs, number)

    @cached_property
    def _totals(self) -> PlanTotals:
        spec, count = self.spec, len(self.tables)
        done = packs = tokens = oldest = 0
        drawn, targets, mass = np.zeros(count, np.int64), np.zeros(count), np.zeros(count)
        for _, window, steps in self._windows(WindowState.start(count)):
            done += steps
            packs += sum(window.packs_of_step[:steps])
            for part in window.first(steps):
                tokens += int(part.length.sum())
                oldest = max(oldest, int(part.age.max(initial=0)))
                drawn += np.bincount(part.source, minlength=count)
                mass += np.bincount(part.source, part.mass, count)
                targets += np.bincount(part.source, self._targets(part), count)
        mass *= [self._factor(s) for s in range(count)]
        sources = tuple(
            SourceTotals(
                name=table.name,
                lam=self.lambdas[s],
                share=float(mass[s] / mass.sum()),
                passes=float(drawn[s] / max(1, len(table.rows))),
                conversations=int(drawn[s]),
                targets=float(targets[s]),
            )
            for s, table in enumerate(self.tables)
        )
        conversations = int(drawn.sum())
        per_step = spec.packs_per_step or spec.conversations_per_step or 1
        return PlanTotals(
            steps=done,
            packs=packs,
            conversations=conversations,
            tokens=tokens,
            targets=float(targets.sum()),
            fill=tokens / (packs * spec.pack_tokens),
            unpacked_steps=-(-conversations // per_step),
            oldest=oldest,
            sources=sources,
        )

    def totals(self) -> PlanTotals:
        """The real plan, counted once. Raises ConfigError, with the number of steps that fit, when
        a source would be needed more often than its `max_passes`."""
        return self._totals

    def _windows(self, state: WindowState) -> Iterator[tuple[WindowState, Window, int]]:
        """Every window that holds a step, with the state at its start and how many of its steps are taken."""
        last = self.spec.max_steps
        while last is None or state.step < last:
            window, after, end = self._window(state)
            if after.step > state.step:
                yield state, window, (after.step if last is None else min(last, after.step)) - state.step
            if end:
                self._check_end(after.step, end)
                return
            state = after

    def _check_end(self, steps: int, end: str) -> None:
        """The draws have ended: with the last epoch, or because a source would be seen too often."""
        if end == "epochs" or steps >= (self.spec.max_steps or np.inf):
            return
        table = next(t for t in self.tables if t.name == end)
        raise ConfigError(
            f"source {table.name} would be seen more than max_passes={table.max_passes:g} times; {steps} steps fit: "
            f"set train.max_steps={steps}, raise data.max_passes, or lower the lambda of {table.name}"
        )

    def _lookup(self, source: NDArray[np.int16], index: Ints) -> tuple[Ints, Floats]:
        """Length and mass of conversations of several sources, gathered source by source."""
        length, mass = np.empty(len(index), np.int64), np.empty(len(index))
        for s, table in enumerate(self.tables):
            mine = np.flatnonzero(source == s)
            length[mine] = table.lengths[index[mine]]
            mass[mine] = self._mass(s, index[mine])
        return length, mass

    def _window(self, state: WindowState) -> tuple[Window, WindowState, str]:
        """Draw, pack, and say what is carried over; the last item says why the draws end here, if they do."""
        source, index, cursor = state.source, state.index, state.cursor
        while True:
            drawn, cursor = self._mixture.draw(cursor, self.spec.window or WINDOW)
            source, index = np.concatenate([source, drawn.source]), np.concatenate([index, drawn.index])
            if drawn.end or self._is_enough(source, index):
                break
        length, mass = self._lookup(source, index)
        longest = int(length.max(initial=0))
        if longest > self.spec.pack_tokens:
            raise ConfigError(
                f"a conversation has {longest} tokens, a pack holds {self.spec.pack_tokens}: "
                "train.pack_tokens must be at least data.max_len; raise it or lower data.max_len"
            )
        age = np.concatenate([state.age, np.zeros(len(index) - len(state.index), np.int64)])
        pool = Conversations(source, index, length, mass, age)
        if self.spec.packing and self.spec.packs_per_step is not None:
            seed = key64(self.spec.seed, 1, *cursor.drawn)
            window, left = self._balanced(pool, self.spec.packs_per_step, seed, flush=bool(drawn.end))
        else:
            window, left = self._in_order(pool, flush=bool(drawn.end))
        step = state.step + len(window.packs_of_step)
        older = left.age + bool(window.packs_of_step)
        return window, WindowState(step, cursor, left.source, left.index, older), drawn.end

    def _is_enough(self, source: NDArray[np.int16], index: Ints) -> bool:
        """Whether a window can be planned: small steps need many of their kind, to put costly packs beside equals."""
        slots = self.spec.packs_per_step
        if self.spec.window is not None or slots is None or slots > SMALL_STEP or not self.spec.packing:
            return True
        tokens = int(self._lookup(source, index)[0].sum())
        return tokens * (1 - SPARE) >= SMALL_STEPS * slots * self.spec.pack_tokens

    def _balanced(self, pool: Conversations, slots: int, seed: int, flush: bool) -> tuple[Window, Conversations]:
        """Steps of `slots` packs; with `flush` everything is packed, and the last step may be smaller."""
        capacity = self.spec.pack_tokens
        window = Window()
        while steps := int(int(pool.length.sum()) * (1 - SPARE)) // (slots * capacity):
            pack = self._grid(pool, steps, slots, seed, dense=self.cost.dense)
            order = shuffled(steps, seed)  # the costly packs open the grid, they must not open the window
            window.add(pool, np.where(pack < 0, -1, order[pack // slots] * slots + pack % slots), [slots] * steps)
            pool = pool.take(pack < 0)
            if not flush:
                break
        while flush and len(pool.index):
            number = min(slots, -(-int(pool.length.sum()) // capacity))
            while ((pack := self._grid(pool, 1, number, seed)) < 0).any() and number < slots:
                number += 1
            window.add(pool, pack, [number])
            pool = pool.take(pack < 0)
        return window, pool

    def _grid(self, pool: Conversations, steps: int, slots: int, seed: int, dense: float = 0.0) -> Ints:
        attention = self.cost.attention_of(pool.length)
        return pack_grid(
            pool.length,
            self.spec.pack_tokens,
            steps,
            slots,
            attention=attention,
            source=pool.source,
            mass=pool.mass,
            age=pool.age,
            dense=dense,
            seed=seed,
        )

    def _in_order(self, pool: Conversations, flush: bool) -> tuple[Window, Conversations]:
        """Steps of exactly so many conversations, in mixture order."""
        size = self.spec.conversations_per_step or self.spec.packs_per_step or 1
        window = Window()
        stop = len(pool.index) if flush else len(pool.index) // size * size
        for first in range(0, stop, size):
            part = pool.take(slice(first, min(first + size, stop)))
            pack = self._few_packs(part) if self.spec.packing else np.arange(len(part.index))
            window.add(part, pack, [int(pack.max()) + 1])
        return window, pool.take(slice(stop, None))

    def _few_packs(self, part: Conversations) -> Ints:
        """All conversations of a step in as few packs as will hold them."""
        number = -(-int(part.length.sum()) // self.spec.pack_tokens)
        while ((pack := self._grid(part, 1, number, 0)) < 0).any():
            number += 1
        return pack

    def _factor(self, source: int) -> float:
        """Weight of a source's tokens: lambda / natural share in mix_mode loss."""
        if self.spec.mix_mode == "sampling" or self.lambdas[source] == 0:
            return 1.0
        return self.lambdas[source] / self._natural[source]

    def _targets(self, part: Conversations) -> Floats:
        """Supervised tokens per conversation, float64, weighted as in the store."""
        if self.spec.loss_weighting == "token":
            return part.mass
        targets = np.empty(len(part.index))
        for s, table in enumerate(self.tables):
            mine = np.flatnonzero(part.source == s)
            targets[mine] = table.targets[part.index[mine]]
        return targets

    def _step(self, start: WindowState, parts: list[Conversations], step: int) -> StepPlan:
        packs, weights = [], np.zeros(len(self.tables))
        factors = np.array([self._factor(s) for s in range(len(self.tables))])
        for part in parts:
            row = np.empty(len(part.index), np.int64)
            for s in np.unique(part.source):
                row[part.source == s] = self.tables[s].rows[part.index[part.source == s]]
            targets = self._targets(part)
            scale = factors[part.source] * (part.mass / targets)
            packs.append(Pack(part.source, row, part.length.astype(np.int32), scale, targets))
            weights += np.bincount(part.source, scale * targets, len(self.tables))
        total = float(weights.sum())
        shares = tuple((weights / total).tolist())
        return StepPlan(step, packs, total, shares, LoaderState(step + 1, start, self.fingerprint))
