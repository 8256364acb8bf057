"""What is asked of a mask and what comes out of it: options, encoded rows, refusals, the turns that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import ConfigError
from sftdist.core.settings import Reasoning, TrainOn
from sftdist.data.message import Message
from sftdist.data.render import Unproven

OPTIONAL_FIELDS = ("reasoning", "tools", "name")


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids int32 [n]; weights float32 [n], the weight of token i as a target (0: not supervised)."""

    id: str
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A conversation (or one turn of it) whose mask cannot be proven; equal problems share `reason`."""

    id: str
    reason: str
    detail: str
    turn: int | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class MaskOptions:
    """Which assistant turns are trained, what happens to reasoning, and whether each turn is a sample of its own.

    `allow_unrendered`: fields that a row may lose where the template never renders them (OPTIONAL_FIELDS); else it is
    refused. `ConfigError` for other words.
    """

    train_on: TrainOn = TrainOn.all
    reasoning: Reasoning = Reasoning.keep
    expand_turns: bool = False
    allow_unrendered: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [field for field in self.allow_unrendered if field not in OPTIONAL_FIELDS]
        if unknown:
            required = " | ".join(OPTIONAL_FIELDS)
            raise ConfigError(f"data.allow_unrendered: given {', '.join(map(str, unknown))}, required {required}")


def without_field(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], field: str
) -> tuple[Sequence[Message], Sequence[Mapping[str, Any]]]:
    """The conversation without one of OPTIONAL_FIELDS. A result keeps the name of a call, which is rendered there."""
    if field == "tools":
        return messages, ()
    if field == "reasoning":
        return [replace(m, reasoning=None) for m in messages], tools
    called = {call["function"]["name"] for m in messages for call in m.tool_calls}
    return [m if m.role == "tool" and m.name in called else replace(m, name=None) for m in messages], tools


def trained_turns(messages: Sequence[Message], train_on: TrainOn) -> dict[int, int]:
    """Number of each trained assistant turn (from 0) -> index of its message.

    A message's own `train` or a weight of 0 keeps it out of `all` and `last`; `flagged` takes `train: true` alone.
    """
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    chosen = dict(list(enumerate(turns))[-1:] if train_on is TrainOn.last else enumerate(turns))
    wanted = {
        number: i
        for number, i in chosen.items()
        if messages[i].weight > 0
        and (messages[i].train is True if train_on is TrainOn.flagged else messages[i].train is not False)
    }
    if not wanted:
        given = f"{len(turns)} assistant turns, none of them to be trained under data.train_on={train_on}"
        raise Unproven("nothing to train", f"{given}; set `train` or `weight`, or leave the row out")
    return wanted


def with_reasoning(messages: Sequence[Message], mode: Reasoning) -> Sequence[Message]:
    """Take reasoning out of all turns (`drop`), or of all but the last assistant turn (`last`)."""
    if mode is Reasoning.keep or all(m.reasoning is None for m in messages):
        return messages
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    kept = last if mode is Reasoning.last else -1
    return [m if i == kept or m.reasoning is None else replace(m, reasoning=None) for i, m in enumerate(messages)]
