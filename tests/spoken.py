"""A model that says what it is given, for the tests of conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sftdist.evals.backends.interface import Ids


class Scripted:
    """Says these ids, and is interrupted after so many of them."""

    def __init__(self, ids: Sequence[int], breaks_after: int | None = None) -> None:
        self._ids, self._after = tuple(ids), breaks_after

    def told(self, prompt: Ids, max_new_tokens: int, tell: Callable[[int], None]) -> Ids:
        for count, token in enumerate(self._ids):
            if count == self._after:
                raise KeyboardInterrupt
            tell(token)
        return self._ids
