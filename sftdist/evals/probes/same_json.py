"""When two values of JSON are the same."""

from __future__ import annotations

import json
from typing import Any


def plain(value: Any) -> str:
    """JSON text that is equal for values that JSON Schema calls equal: 1 and 1.0 are, 1 and true are not (they are
    in Python), keys have no order. Raises RecursionError for what is nested too deeply."""
    return json.dumps(_with_plain_numbers(value), sort_keys=True)


def _with_plain_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _with_plain_numbers(item) for key, item in value.items()}
    return [_with_plain_numbers(item) for item in value] if isinstance(value, list) else value
