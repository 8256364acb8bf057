"""How good an answer is beside its reference: pure functions of text, 0.0 to 1.0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator


def normalised(text: str) -> str:
    """Lower case, single spaces, no white space around: what two equal answers may differ in."""
    return " ".join(text.lower().split())


def same_answer(answer: str, reference: str) -> float:
    """1.0 where the answers differ in case and white space at most."""
    return float(normalised(answer) == normalised(reference))


def same_text(answer: str, reference: str) -> float:
    """1.0 where the answers differ in white space at their ends at most: capital letters count."""
    return float(answer.strip() == reference.strip())


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_object(answer: str) -> dict[str, Any] | None:
    """The JSON object that the whole answer is, or None."""
    try:
        value = json.loads(answer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def valid_under(answer: str, schema: Mapping[str, Any]) -> float:
    """1.0 where the whole answer is a JSON object that is valid under the JSON schema (draft 2020-12)."""
    value = parse_object(answer)
    return float(value is not None and Draft202012Validator(schema).is_valid(value))


def fields_right(answer: str, reference: str) -> float:
    """The share of the reference's fields that the answer has with the same value and type.

    An answer that is no JSON object has none. Raises ValueError where the reference is no JSON object with fields.
    """
    wanted, given = parse_object(reference), parse_object(answer) or {}
    if not wanted:
        raise ValueError(f"reference: given {reference[:80]!r}, required a JSON object with fields")
    # Compared as JSON text, since True == 1 in Python.
    return sum(key in given and json.dumps(given[key]) == json.dumps(wanted[key]) for key in wanted) / len(wanted)
