"""One line of JSON, strictly: UTF-8, no duplicate keys, no NaN; every fault is told apart."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sftdist.data.rowerror import RowError


def decode_line(raw: bytes, *, torn: bool) -> object:
    """The value of a line without its line end; `torn`: it is the last of a file that does not end with one.

    A fault is a `RowError` whose field is the line.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        given = f"byte 0x{raw[problem.start]:02x} at byte {problem.start + 1}"
        raise RowError("line", given, "UTF-8 text", "invalid UTF-8") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as problem:
        where = f"{problem.msg} at column {problem.colno}"
        if torn:
            required = "a complete JSON object (the file was cut off)"
            raise RowError("line", f"a last line that breaks off: {where}", required, "truncated last line") from None
        raise RowError("line", f"{where}{_hint(text)}", "one JSON object per line", "not JSON") from None
    except RecursionError:
        raise RowError("line", "JSON nested too deeply", "a row of messages", "nested too deeply") from None


def decode_embedded(text: str, path: str) -> Any:
    """The value of JSON that a row holds as text, as strictly; raises JSONDecodeError where it is none, else RowError
    at `path`."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise RowError(path, "JSON nested too deeply", "what a template can render", "nested too deeply") from None
    except RowError as problem:
        where = path if problem.field == "line" else f"{path}.{problem.field}"
        raise RowError(where, problem.given, problem.required, problem.reason) from None


def _hint(text: str) -> str:
    """A JSON file that is no JSONL begins with a bracket alone, or with an object that is spread over lines."""
    return " (a JSON array over many lines? convert it: jq -c '.[]')" if text.strip() in ("[", "{", "[{") else ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(twice, "the key twice in one object", "each key once", "duplicate key")
    return found


def _constant(name: str) -> NoReturn:
    raise RowError("line", name, "a JSON number (NaN and Infinity are none)", "NaN or Infinity")


def _integer(text: str) -> int:
    if len(text) > 1000:
        raise RowError("line", f"a number of {len(text)} digits", "at most 1000", "number is too long")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
