"""A problem inside one row: what was given and what is required, in words that any file and terminal can take."""

from __future__ import annotations

import json
from typing import NoReturn


class RowError(ValueError):
    """A problem inside one row, before it is known which row that is."""

    def __init__(self, field: str, given: str, required: str, reason: str) -> None:
        self.field, self.given, self.required, self.reason = map(printable, (field, given, required, reason))
        super().__init__(f"{self.field}: given {self.given}, required {self.required}")


def fail(field: str, given: str, required: str, reason: str) -> NoReturn:
    raise RowError(field, given, required, reason)


def show(value: object, limit: int = 60) -> str:
    """A value as it is quoted in a message: JSON where possible, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True)
    except (RecursionError, ValueError):  # deeper than Python reads, a circle, a number of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown"
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def encodable(text: str, path: str) -> str:
    """JSON may hold half of a surrogate pair (`"\\ud800"`), which is no character and has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        given = f"half of a surrogate pair at character {problem.start}"
        raise RowError(path, given, "Unicode text", "half of a surrogate pair") from None
    return text


def printable(text: str) -> str:
    """Halves of surrogate pairs, which no file takes, as `\\ud800`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
