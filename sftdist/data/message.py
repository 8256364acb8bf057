"""One message of a conversation: the type, and how a raw turn of any row shape becomes it.

Nothing is repaired silently and no field that carries content is dropped: what does not fit raises a
`RowError` that says where, what was given and what is required.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftdist.data.jsonline import decode_embedded
from sftdist.data.rowerror import RowError, encodable, fail, show

ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields that hold content which the schema cannot carry: a row with one of them is refused, not stripped.
UNSUPPORTED = ("function_call", "refusal")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TEXT_ONLY = "text alone, which is what is trained here: leave the row out, or make text of it with a row_function"
MAX_DEPTH = 64  # of arguments and tools: deeper than any schema, and far from where Python gives up
MAX_BITS = 3300  # of a whole number, some 1000 digits
MAX_WEIGHT = 1e6


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train` overrides what `train_on` says for it, `weight` scales its loss."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    train: bool | None = None
    weight: float = 1.0


# --- one message ----------------------------------------------------------------------------------


def parse_message(
    turn: object,
    path: str,
    role_key: str,
    text_key: str,
    names: Mapping[str, str] | None,
    *,
    may_be_empty: bool = False,
) -> Message:
    if not isinstance(turn, Mapping):
        fail(path, show(turn), f"an object with {role_key} and {text_key}", "message is not an object")
    role = _role(turn.get(role_key), f"{path}.{role_key}", names)
    for key in UNSUPPORTED:
        if turn.get(key):
            fail(f"{path}.{key}", show(turn[key]), "text, reasoning and tool_calls only", f"{key} is not supported")
    refuse_media(turn, f"{path}.")
    calls = _tool_calls(turn.get("tool_calls"), role, f"{path}.tool_calls")
    reasoning = _reasoning(turn, role, path)
    may_be_empty = may_be_empty or role == "tool" or bool(calls) or reasoning is not None
    return Message(
        role=role,
        content=parse_text(turn.get(text_key), f"{path}.{text_key}", may_be_empty=may_be_empty),
        reasoning=reasoning,
        tool_calls=calls,
        name=_optional_text(turn, "name", path),
        tool_call_id=_optional_text(turn, "tool_call_id", path),
        train=_train_flag(turn.get("train"), role, f"{path}.train"),
        weight=_weight(turn.get("weight"), role, f"{path}.weight"),
    )


def refuse_media(fields: Mapping[str, Any], prefix: str = "") -> None:
    """A row or a message that comes with pictures, sound or film would lose them without a word."""
    for key in MEDIA:
        if fields.get(key):
            fail(f"{prefix}{key}", show(fields[key]), TEXT_ONLY, f"{key} beside the text")


def _role(value: object, path: str, names: Mapping[str, str] | None) -> str:
    role = (names.get(value) if names is not None else value) if isinstance(value, str) else None
    if role is None or role not in ROLES:
        fail(path, show(value), " | ".join(names or ROLES), "unknown role")
    return role


def parse_text(value: object, path: str, *, may_be_empty: bool = False) -> str:
    if isinstance(value, list | tuple):
        value = "".join(_part(part, f"{path}[{i}]") for i, part in enumerate(value))
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        given = "nothing" if value is None else show(value)
        fail(path, given, "text", "text is missing" if value is None else "content is not text")
    if not may_be_empty and (not value or value.isspace()):
        fail(path, "empty text" if not value else show(value), "text", "empty content")
    return encodable(value, path)


def _part(part: object, path: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    fail(path, f"a part of type {show(kind)}" if kind else show(part), TEXT_ONLY, "content part is not text")


def _optional_text(turn: Mapping[str, Any], key: str, path: str) -> str | None:
    value = turn.get(key)
    return None if value is None else parse_text(value, f"{path}.{key}")


def _reasoning(turn: Mapping[str, Any], role: str, path: str) -> str | None:
    found = [key for key in ("reasoning_content", "thinking", "reasoning") if turn.get(key)]
    if not found:
        return None
    if role != "assistant":
        given = f"reasoning in a {role} turn"
        fail(f"{path}.{found[0]}", given, "it in assistant turns only", "reasoning is misplaced")
    texts = {parse_text(turn[key], f"{path}.{key}") for key in found}
    if len(texts) > 1:
        fail(f"{path}.{found[0]}", f"another text than in {found[1]}", "one reasoning text", "reasoning is ambiguous")
    return texts.pop()


def _train_flag(value: object, role: str, path: str) -> bool | None:
    if value is not None and not isinstance(value, bool):
        fail(path, show(value), "true or false", "train is not a flag")
    if value and role != "assistant":
        fail(path, f"true in a {role} turn", "assistant turns only", "only assistant turns can be trained")
    return value


def _weight(value: object, role: str, path: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        fail(path, show(value), "a number of at least 0", "weight is not a number")
    if value > MAX_WEIGHT:
        fail(path, show(value), f"a number of at most {MAX_WEIGHT:,.0f}", "weight is too large")
    if role != "assistant" and value not in (0, 1):
        fail(path, f"{value} in a {role} turn", "weights in assistant turns only", "weight is misplaced")
    return float(value)


# --- tools ------------------------------------------------------------------------------------------


def _tool_calls(value: object, role: str, path: str) -> tuple[dict[str, Any], ...]:
    if not value:
        return ()
    if role != "assistant":
        fail(path, f"tool calls in a {role} turn", "them in assistant turns only", "tool_calls are misplaced")
    if isinstance(value, str) or not isinstance(value, Sequence):
        fail(path, show(value), "a list of calls", "tool_calls are not a list")
    return tuple(_tool_call(call, f"{path}[{i}]") for i, call in enumerate(value))


def _tool_call(call: object, path: str) -> dict[str, Any]:
    """Both `{"function": {"name", "arguments"}}` and `{"name", "arguments"}` become the first, arguments an object."""
    if not isinstance(call, Mapping):
        fail(path, show(call), "an object with a function", "tool call is not an object")
    function, inner = (call["function"], f"{path}.function") if call.get("function") else (call, path)
    if not isinstance(function, Mapping):
        fail(inner, show(function), "an object with name and arguments", "tool call is not an object")
    name = parse_text(function.get("name"), f"{inner}.name")
    arguments = _json_object(function.get("arguments"), f"{inner}.arguments")
    head = {} if call.get("id") is None else {"id": parse_text(call["id"], f"{path}.id")}
    return {**head, "type": "function", "function": {"name": name, "arguments": arguments}}


def _json_object(value: object, path: str) -> dict[str, Any]:
    if value is None:
        return {}
    parsed = value
    if isinstance(value, str):
        try:
            parsed = decode_embedded(value, path) if value.strip() else {}
        except json.JSONDecodeError as problem:
            given = f"{show(value)} ({problem.msg})"
            raise RowError(path, given, "a JSON object", "arguments are not a JSON object") from None
    if not isinstance(parsed, Mapping):
        fail(path, show(value), "a JSON object", "arguments are not a JSON object")
    _check_json(parsed, path)
    return dict(parsed)


def _check_json(value: object, path: str, depth: int = 0) -> None:
    """Arguments and tools are rendered as JSON: nothing that JSON has not, and no broken text anywhere inside."""
    if depth > MAX_DEPTH:
        fail(path, f"more than {MAX_DEPTH} levels", "fewer", "nested too deeply")
    if isinstance(value, str):
        encodable(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        fail(path, str(value), "a finite number", "number is not finite")
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        fail(path, f"a number of {value.bit_length()} bits", f"at most {MAX_BITS}", "number is too long")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                fail(path, f"the key {show(key)}", "keys that are text", "key is not text")
            _check_json(key, path)
            _check_json(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{path}[{i}]", depth + 1)
    elif value is not None and not isinstance(value, int | float):
        fail(path, f"a {type(value).__name__}", "what JSON can hold", "value is not JSON")


def parse_checks(value: Any) -> dict[str, Any]:
    """What an evaluation holds a model's answer against, as it stands in the row; the probes say what they know."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            value = decode_embedded(value, "checks")
        except json.JSONDecodeError as problem:
            given = f"{show(value)} ({problem.msg})"
            raise RowError("checks", given, "a JSON object", "checks are not an object") from None
    if not isinstance(value, Mapping):
        fail("checks", show(value), "a JSON object", "checks are not an object")
    _check_json(value, "checks")
    return {key: item for key, item in value.items() if item is not None}  # a table has every row's fields


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = decode_embedded(value, "tools")
        except json.JSONDecodeError as problem:
            given = f"{show(value)} ({problem.msg})"
            raise RowError("tools", given, "a list of tools", "tools are not a list") from None
    if not value:
        return ()
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(tool, Mapping) for tool in value):
        fail("tools", show(value), "a list of objects", "tools are not a list")
    _check_json(value, "tools")
    return tuple(dict(tool) for tool in value)
