"""Live traffic: what users asked a released model, and what it said where that is there.

A row is `{"prompt": text}` or `{"messages": [...]}`, with an `answer` or a last assistant message; other fields
(`timestamp`, `id`) are not looked at. Rows that are none of this are named, and too many of them are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftdist.core.errors import DataError
from sftdist.data.jsonline import decode_line
from sftdist.data.message import Message, parse_message, parse_text
from sftdist.data.rowerror import RowError, fail, show
from sftdist.data.sources import Chunk, Part, Source, chunks, parts_of

KEY = "traffic"
MOST_BAD = 0.01
NAMED = 20
SHOWN = 5


@dataclass(frozen=True, slots=True)
class LiveRow:
    """One question: the messages up to it, and the answer that was given. `place`: file and line."""

    place: str
    messages: tuple[Message, ...]
    answer: str | None

    @property
    def prompt(self) -> str:
        """What the user said last."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Traffic:
    """The rows, the first of the bad ones in words, how many bad ones there are by reason; `torn`: last lines that
    break off, as those of a log that is being written do."""

    rows: list[LiveRow]
    bad: list[str]
    reasons: dict[str, int]
    torn: int


def read_traffic(path: str | Sequence[str]) -> Traffic:
    """Read JSONL (or parquet) files, folders or globs.

    Raises DataError where there is nothing to read, and where more than 1 % of the rows are bad.
    """
    entries = (path,) if isinstance(path, str) else tuple(path)
    parts = parts_of(Source(KEY, entries, key=KEY))
    rows: list[LiveRow] = []
    bad: list[str] = []
    reasons: Counter[str] = Counter()
    torn = 0
    for chunk in chunks(parts):
        for place, raw, cut in _raw_rows(chunk, parts):
            try:
                row = decode_line(raw, torn=cut) if isinstance(raw, bytes) else raw
                rows.append(_live_row(row, place))
            except RowError as problem:
                if cut and problem.field == "line":
                    torn += 1
                    continue
                reasons[problem.reason] += 1
                if len(bad) < NAMED:
                    bad.append(f"{place}: {problem}")
    _require_few(len(rows), bad, reasons)
    return Traffic(rows, bad, dict(reasons.most_common()), torn)


def _raw_rows(chunk: Chunk, parts: Sequence[Part]) -> Iterable[tuple[str, bytes | Mapping[str, Any], bool]]:
    for i, (line, raw) in enumerate(chunk.rows):
        yield f"{parts[chunk.part].shown}:{line}", raw, chunk.torn and i == len(chunk.rows) - 1


def _require_few(good: int, named: Sequence[str], reasons: Counter[str]) -> None:
    bad = reasons.total()
    if bad <= MOST_BAD * (bad + good):
        return
    why = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(SHOWN))
    lines = [
        f"{KEY}: given {bad:,} bad rows of {bad + good:,} ({why}), required at most {MOST_BAD:.0%}; a row "
        'is {"prompt": text} or {"messages": [...]}, with an "answer" where there is one',
        *named[:SHOWN],
    ]
    raise DataError("\n".join(lines))


def _live_row(row: object, place: str) -> LiveRow:
    if not isinstance(row, Mapping):
        fail("row", show(row), "a JSON object", "row is not an object")
    if (row.get("prompt") is None) == (row.get("messages") is None):
        given = "both" if row.get("prompt") is not None else f"keys {', '.join(map(str, row))[:80] or '(none)'}"
        fail("row", given, "prompt or messages", "neither prompt nor messages, or both")
    messages, said = _messages(row)
    answer = row.get("answer")
    if answer is None:
        return LiveRow(place, messages, said)
    text = parse_text(answer, "answer", may_be_empty=True)
    if said not in (None, text):
        fail("answer", "another text than that of the last message", "one answer", "two answers")
    return LiveRow(place, messages, text)


def _messages(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str | None]:
    """The messages up to the last question, and what the assistant said after it."""
    if row.get("prompt") is not None:
        return (Message("user", parse_text(row["prompt"], "prompt")),), None
    turns = row["messages"]
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        fail("messages", show(turns), "a list of messages", "messages are not a list")
    messages = [_message(turn, i, is_last=i == len(turns) - 1) for i, turn in enumerate(turns)]
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if asked is None:
        fail("messages", f"{len(messages)} messages without a user turn", "at least one", "no user turn")
    last = messages[-1] if messages[-1].role == "assistant" else None
    return tuple(messages[: asked + 1]), None if last is None else _said(last)


def _message(turn: object, place: int, *, is_last: bool) -> Message:
    """The last one may be an answer that is empty: a model that says nothing is what a look should see."""
    may_be_empty = is_last and isinstance(turn, Mapping) and turn.get("role") == "assistant" and "content" in turn
    return parse_message(turn, f"messages[{place}]", "role", "content", None, may_be_empty=may_be_empty)


def _said(message: Message) -> str:
    """An answer of tool calls alone is their JSON."""
    if message.content or not message.tool_calls:
        return message.content
    return json.dumps([call["function"] for call in message.tool_calls], ensure_ascii=False)
