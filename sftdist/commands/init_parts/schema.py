"""A JSON Schema from examples: what all of them have in common, and no more than they show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

WORDS_MOST = 20  # different texts of a field that may be a list of words
WORD_SEEN = 5  # times, each of them: what was seen less often is not the whole list
CLOSED_KEYS = 50  # different keys of an object beyond which it is a table of its own
DEPTH = 8  # levels that are described; below that anything is allowed
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def schema_of(values: Sequence[Any], depth: int = DEPTH) -> dict[str, Any]:
    """A schema that every one of the values fulfils. Draft 2020-12."""
    types = {TYPES[type(value)] if value is not None else "null" for value in values}
    if "number" in types:
        types.discard("integer")
    found: dict[str, Any] = {"type": types.pop() if len(types) == 1 else sorted(types)} if types else {}
    if depth == 0:
        return found
    objects = [value for value in values if isinstance(value, dict)]
    items = [item for value in values if isinstance(value, list) for item in value]
    if objects:
        found |= _object(objects, depth)
    if items:
        found["items"] = schema_of(items, depth - 1)
    if found.get("type") == "string" and (words := _words(values)):
        found["enum"] = words
    return found


def _object(objects: Sequence[dict[str, Any]], depth: int) -> dict[str, Any]:
    counts = Counter(key for value in objects for key in value)
    if len(counts) > CLOSED_KEYS:
        return {}
    inner = {key: schema_of([value[key] for value in objects if key in value], depth - 1) for key in counts}
    required = [key for key, count in counts.items() if count == len(objects)]
    return {"properties": inner, "required": required, "additionalProperties": False}


def _words(values: Sequence[Any]) -> list[str]:
    """The words of a field that has few, each seen often; else none."""
    counts = Counter(values)
    return sorted(counts) if len(counts) <= WORDS_MOST and min(counts.values()) >= WORD_SEEN else []
