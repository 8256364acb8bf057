"""What an engine of the evaluation does, whichever library answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Ids = tuple[int, ...]


class Engine(Protocol):
    """A model that continues prompts greedily."""

    def continued(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        """The new tokens after each prompt, in order: up to `max_new_tokens`, or up to and with a stop id."""
        ...
