"""Rows that cannot be used: written down one by one, told in groups, with the overrides to go on without them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftdist.data.mask import Refusal
from sftdist.data.schema import Conversation
from sftdist.data.sources import Rejected

BAD, REFUSED = "bad", "refused"
EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that is left out. kind: bad (cannot be parsed) or refused (its mask cannot be proven)."""

    kind: str
    source: str
    file: str
    line: int
    id: str
    reason: str
    message: str  # `field: what was given, what is required`
    row: str

    def to_dict(self, shown: str) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "source": self.source,
            "file": shown,
            "line": self.line,
            "id": self.id,
            "reason": self.reason,
            "message": self.message,
            "row": self.row,
        }


def bad_row(source: str, rejected: Rejected) -> Problem:
    r = rejected.reject
    message = f"{r.field}: given {r.given}, required {r.required}"
    return Problem(BAD, source, r.file, r.line, r.id, r.reason, message, rejected.row)


def refused_row(source: str, conversation: Conversation, refusal: Refusal, row: str) -> Problem:
    where = "conversation" if refusal.turn is None else f"assistant turn {refusal.turn}"
    message = f"{where}: {refusal.reason}: {refusal.detail}"
    file, line = conversation.file, conversation.line
    return Problem(REFUSED, source, file, line, conversation.id, refusal.reason, message, row)


@dataclass
class Group:
    """Problems with one reason: how many, and the first few as they are shown."""

    kind: str
    reason: str
    rows: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Limit:
    """How many rows of a kind there may be, by the value of `option`. `said`: what is wrong with them."""

    kind: str
    said: str
    option: str
    allowed: int

    def sentence(self, count: int) -> str:
        return f"{rows(count)} {self.said} (allowed: {self.option}={self.allowed})"

    def override(self, count: int) -> str:
        """What lets all of them pass."""
        return f"{self.option}={max(count, self.allowed)}"


@dataclass(frozen=True)
class Ban(Limit):
    """A kind of which there may be no row, because `option` is `error`; `instead` leaves them out."""

    allowed: int = 0
    instead: str = "drop"

    def sentence(self, count: int) -> str:
        return f"{rows(count)} {self.said} ({self.option}=error)"

    def override(self, count: int) -> str:
        return f"{self.option}={self.instead}"


class Problems:
    """All problems of a run by reason; memory holds a few examples of each."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], Group] = {}
        self._rows: Counter[str] = Counter()
        self._last: dict[str, tuple[Any, ...]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one problem of a file of problems, in which those of one row stand together."""
        kind, where = row["kind"], (row["source"], row["file"], row["line"], row["id"])
        group = self.groups.setdefault((kind, row["reason"]), Group(kind, row["reason"]))
        group.rows += 1
        if len(group.examples) < EXAMPLES:
            group.examples.append(f"{row['file']}:{row['line']}: {row['message']}")
        self._rows[kind] += self._last.get(kind) != where  # two problems of one row count once
        self._last[kind] = where

    def count(self, kind: str) -> int:
        """How many rows have a problem of this kind."""
        return self._rows[kind]

    def refusal(self, limits: Sequence[Limit], written_to: Path) -> str | None:
        """The message that ends prepare, its last line the overrides to paste; None when the limits allow it."""
        found = [(limit, count) for limit in limits if (count := self.count(limit.kind))]
        if all(count <= limit.allowed for limit, count in found):
            return None
        lines = [", ".join(limit.sentence(count) for limit, count in found) + "."]
        kinds = [limit.kind for limit, _ in found]
        shown = [group for group in self.groups.values() if group.kind in kinds]
        for group in sorted(shown, key=lambda group: (kinds.index(group.kind), -group.rows, group.reason)):
            lines.append(f"{group.kind}: {group.reason}: {rows(group.rows)}")
            lines += [f"  {example}" for example in group.examples]
        lines.append(f"All of them are in {written_to}. Repair them, or leave them out with:")
        return "\n".join([*lines, " ".join(limit.override(count) for limit, count in found)])


def rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def write_problems(path: Path, found: Iterable[Mapping[str, Any]], see: Callable[[Mapping[str, Any]], None]) -> None:
    """Replace the file of bad rows in one step, showing each row to `see`; without rows there is no file."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    anything = False
    try:
        with temp.open("w", encoding="utf-8") as file:
            for row in found:
                anything = True
                see(row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if anything:
            temp.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        temp.unlink(missing_ok=True)
