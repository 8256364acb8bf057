"""A sample of fixed size that depends neither on the order of what is seen nor on how it is divided among processes."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from typing import Any

Entry = list[Any]  # [key, count, value]


class Smallest:
    """The entries with the smallest keys of all that were added, each with how often it was and its smallest value.

    An entry that is among the smallest of all is among the smallest of every part that has it, so nothing of it is ever
    lost: merging gives the same sample and the same counts in any grouping. With hashes as keys it is a random sample
    (a bottom-k sketch: Cohen and Kaplan 2007, https://doi.org/10.1145/1281100.1281133).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.overflowed = False  # whether something was left out
        self._found: dict[int, Entry] = {}
        self._keys: list[int] = []

    def add(self, key: int, value: Any, count: int = 1) -> Entry | None:
        """The entry that had to leave for it, which may be itself. `value`: with an order, and JSON can hold it."""
        if (entry := self._found.get(key)) is not None:
            entry[1] += count
            entry[2] = min(entry[2], value)
            return None
        new, left = [key, count, value], None
        if len(self._keys) == self.size:
            self.overflowed = True
            if key > self._keys[-1]:
                return new
            left = self._found.pop(self._keys.pop())
        self._found[key] = new
        insort(self._keys, key)
        return left

    def wants(self, key: int) -> bool:
        """Whether `add` would take it; asked before a value is made that costs something. A no is remembered."""
        wanted = len(self._keys) < self.size or key <= self._keys[-1]
        self.overflowed = self.overflowed or not wanted
        return wanted

    def __iter__(self) -> Iterator[Entry]:
        """By key."""
        return (self._found[key] for key in self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def distinct(self, key_range: int) -> int:
        """How many keys were added: exact until something was left out, then estimated from how dense they lie."""
        if not self.overflowed:
            return len(self._keys)
        return round((self.size - 1) * key_range / self._keys[-1])

    def to_json(self) -> dict[str, Any]:
        return {"overflowed": self.overflowed, "entries": list(self)}

    def merge(self, found: dict[str, Any]) -> list[Entry]:
        """Add what another one said of itself; the entries that had to leave."""
        self.overflowed = self.overflowed or found["overflowed"]
        left = (self.add(key, value, count) for key, count, value in found["entries"])
        return [entry for entry in left if entry is not None]


def smallest(found: Iterable[Any], size: int) -> list[Any]:
    """The first `size` of things with an order."""
    return sorted(found)[:size]
