"""What a plan is made of: the spec, packs and steps, the position of the next step, the totals.

Plain data; `data/plan.py` computes it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import CheckpointError
from sftdist.data.mixture import Cursor, Floats, Ints
from sftdist.data.packing import CostModel, deal

STATE_VERSION = 2  # also of the algorithm: raise it with every change that moves a conversation to another step


@dataclass(frozen=True)
class PlanSpec:
    """What a step is. Exactly one of `packs_per_step` and `conversations_per_step`; `max_steps`, `epochs` or both.

    `packing=False`: each conversation is a pack of its own. `window`: conversations planned at a
    time; None: 4,096, and where steps are small as many as make 32 of them. `mix_mode`: sampling |
    loss. `loss_weighting`: token | conversation. An epoch is as many supervised tokens as the drawn
    sources hold.
    """

    pack_tokens: int
    packs_per_step: int | None = None
    conversations_per_step: int | None = None
    packing: bool = True
    window: int | None = None
    seed: int = 0
    mix_mode: str = "sampling"
    max_steps: int | None = None
    epochs: float | None = None
    loss_weighting: str = "token"

    def issues(self) -> list[str]:
        """Everything that is wrong with these values."""
        found = []
        if (self.packs_per_step is None) == (self.conversations_per_step is None):
            found.append(
                f"packs_per_step={self.packs_per_step} and conversations_per_step={self.conversations_per_step}: "
                "exactly one is required; remove the other"
            )
        if self.max_steps is None and self.epochs is None:
            found.append("neither max_steps nor epochs is given: give train.max_steps, train.epochs or both")
        for name in ("pack_tokens", "packs_per_step", "conversations_per_step", "window", "max_steps", "epochs"):
            value = asdict(self)[name]
            if value is not None and value <= 0:
                found.append(f"{name}={value}: a number above 0 is required")
        for name, words in (("mix_mode", ("sampling", "loss")), ("loss_weighting", ("token", "conversation"))):
            if asdict(self)[name] not in words:
                found.append(f"{name}={asdict(self)[name]}: one of {', '.join(words)} is required")
        return found


@dataclass(frozen=True)
class Pack:
    """One micro-batch: `source` int16 [D], `row` int64 [D] row in the source's store, `length` int32 [D].

    `scale` float64 [D]: factor on the token weights of each document; `targets` float64 [D]: sum of
    the store's weights over its targets.
    """

    source: NDArray[np.int16]
    row: Ints
    length: NDArray[np.int32]
    scale: Floats
    targets: Floats

    @property
    def weight(self) -> float:
        """Sum of the token weights: this pack's part of the denominator."""
        return float((self.scale * self.targets).sum())


@dataclass(frozen=True)
class WindowState:
    """Where a window starts: draws so far, the step it begins with, and what was carried over."""

    step: int
    cursor: Cursor
    source: NDArray[np.int16]  # of the conversations carried over, in mixture order
    index: Ints
    age: Ints  # windows in which each was left over

    @classmethod
    def start(cls, sources: int) -> WindowState:
        nothing = np.empty(0, np.int64)
        return cls(0, Cursor.start(sources), nothing.astype(np.int16), nothing, nothing)


@dataclass(frozen=True)
class LoaderState:
    """The position of the next step to take."""

    step: int
    window: WindowState
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        window = self.window
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "step": self.step,
            "window": {
                "step": window.step,
                "drawn": list(window.cursor.drawn),
                "mass": list(window.cursor.mass),
                "source": window.source.tolist(),
                "index": window.index.tolist(),
                "age": window.age.tolist(),
            },
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> LoaderState:
        """Raises CheckpointError for a version this code does not know."""
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"data state of version {state.get('version')}; version {STATE_VERSION} is required: "
                "resume with the sftdist version that wrote it"
            )
        window = state["window"]
        return cls(
            step=state["step"],
            fingerprint=state["fingerprint"],
            window=WindowState(
                step=window["step"],
                cursor=Cursor(tuple(window["drawn"]), tuple(window["mass"])),
                source=np.array(window["source"], np.int16),
                index=np.array(window["index"], np.int64),
                age=np.array(window["age"], np.int64),
            ),
        )


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: its packs, the sum of all token weights over them, and each source's share of it."""

    step: int
    packs: list[Pack]
    denominator: float
    shares: tuple[float, ...]
    after: LoaderState

    @property
    def targets(self) -> float:
        """Supervised tokens, weighted as in the stores."""
        return sum(float(pack.targets.sum()) for pack in self.packs)

    def costs(self, cost: CostModel) -> Floats:
        """FLOPs per pack, float64."""
        return np.array([float(np.add.accumulate(cost.of(pack.length))[-1]) for pack in self.packs])

    def deal(self, world_size: int, cost: CostModel) -> list[list[int]]:
        """Pack numbers per rank: equally many, cost balanced, -1 for an empty pack."""
        return [[int(pack) for pack in rank] for rank in deal(self.costs(cost), world_size)]


@dataclass(frozen=True)
class SourceTotals:
    name: str
    lam: float  # the lambda asked for, normalised
    share: float  # realised share of the weighted targets
    passes: float
    conversations: int
    targets: float  # supervised tokens, weighted as in the store


@dataclass(frozen=True)
class PlanTotals:
    """The whole plan in numbers; `unpacked_steps`: steps of as many single conversations as a step has packs."""

    steps: int
    packs: int
    conversations: int
    tokens: int
    targets: float
    fill: float  # tokens / (packs * pack_tokens)
    unpacked_steps: int
    oldest: int  # windows that a conversation waited at most
    sources: tuple[SourceTotals, ...]
