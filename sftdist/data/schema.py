"""What a conversation is: the versioned schema, and the one function that turns a raw row into it.

A row that does not fit becomes a `Reject` that says where, what was given and what is required; nothing
is repaired silently and no field that carries content is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftdist.core.settings import RowShape
from sftdist.data.message import Message, parse_checks, parse_message, parse_text, parse_tools, refuse_media
from sftdist.data.rowerror import RowError, encodable, fail, show
from sftdist.data.versions import HUMAN, SCHEMA_VERSION, SYNTHETIC, of_today

__all__ = ["SCHEMA_VERSION", "Conversation", "Message", "Reject", "is_label_origin", "parse"]

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Who may speak after whom; None is the start. A trailing user or tool turn is allowed: nothing in it is trained.
FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "developer", "user"),
    "system": ("developer", "user"),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool", "assistant"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole conversation and where it came from; `line` counts from 1 (rows of a table do too).

    `label_origin`: who wrote the answers, `human` or `synthetic:MODEL`; None where nobody said. `checks`: what an
    answer of a model to this prompt must fulfil (`evals.probes`); it is not trained on, and no part of the content key.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    tags: tuple[str, ...] = ()
    label_origin: str | None = None
    checks: dict[str, Any] = field(default_factory=dict, hash=False)
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used; `reason` is the short key that equal problems share."""

    id: str
    file: str
    line: int
    field: str
    given: str
    required: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: given {self.given}, required {self.required}"


def parse(
    row: object,
    shape: RowShape,
    *,
    file: str,
    line: int,
    id: str | None,
    schema_version: int | None = None,
    label_origin: str | None = None,
) -> Conversation | Reject:
    """Turn a raw row into a conversation, or say what is wrong with it.

    `id`, `schema_version` (None: the newest) and `label_origin` are those of a row that names none.
    """
    row_id = id if id is not None else f"{file}:{line}"
    try:
        if not isinstance(row, Mapping):
            fail("row", show(row), "a JSON object", "row is not an object")
        row_id = _row_id(row, row_id)
        refuse_media(row)
        row = of_today(row, schema_version)
        messages = tuple(_MESSAGES_OF[_shape_of(row, shape)](row))
        messages = _with_system(row, messages)
        _check_order(messages)
        return Conversation(
            id=row_id,
            messages=messages,
            tools=parse_tools(row.get("tools")),
            tags=_tags(row),
            label_origin=_label_origin(row) or label_origin,
            checks=parse_checks(row.get("checks")),
            file=file,
            line=line,
        )
    except RowError as problem:
        return Reject(row_id, file, line, problem.field, problem.given, problem.required, problem.reason)


# --- which shape ---------------------------------------------------------------------------------


def _shape_of(row: Mapping[str, Any], named: RowShape) -> RowShape:
    if named is not RowShape.auto:
        return named
    found = [shape for shape in _MESSAGES_OF if _looks_like(row, shape)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(found)
        fail("row", f"keys of {names}", f"one shape (name it: shape={found[0]})", "row shape is ambiguous")
    required = "messages | conversations | prompt and completion | instruction and output"
    fail("row", f"keys {', '.join(map(str, row))[:80] or '(none)'}", required, "row shape is unknown")


def _looks_like(row: Mapping[str, Any], shape: RowShape) -> bool:
    if shape is RowShape.prompt_completion:
        return "prompt" in row and "completion" in row
    if shape is RowShape.alpaca:
        return "instruction" in row and "output" in row
    turns = _turns_key(row)
    return turns is not None and _speaks_sharegpt(row[turns]) == (shape is RowShape.sharegpt)


def _turns_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in ("messages", "conversations", "conversation") if row.get(key) is not None), None)


def _speaks_sharegpt(turns: object) -> bool:
    first = turns[0] if isinstance(turns, Sequence) and turns else None
    return isinstance(first, Mapping) and "from" in first and "role" not in first


# --- rows of each shape ---------------------------------------------------------------------------


def _turns(row: Mapping[str, Any]) -> tuple[str, Sequence[Any]]:
    key = _turns_key(row)
    if key is None:
        fail("messages", "nothing", "a list of messages", "messages are missing")
    turns = row[key]
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        fail(key, show(turns), "a list of messages", "messages are not a list")
    if not turns:
        fail(key, "an empty list", "at least a user and an assistant turn", "no messages")
    return key, turns


def _from_messages(row: Mapping[str, Any]) -> list[Message]:
    key, turns = _turns(row)
    return _message_list(turns, key)


def _message_list(turns: Sequence[Any], key: str) -> list[Message]:
    return [parse_message(turn, f"{key}[{i}]", "role", "content", None) for i, turn in enumerate(turns)]


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    key, turns = _turns(row)
    return [parse_message(turn, f"{key}[{i}]", "from", "value", SHAREGPT_ROLES) for i, turn in enumerate(turns)]


def _from_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    return _side(row, "prompt", "user") + _side(row, "completion", "assistant")


def _side(row: Mapping[str, Any], key: str, role: str) -> list[Message]:
    value = row.get(key)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _message_list(value, key)
    return [Message(role, parse_text(value, key))]


def _from_alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = row.get("history") or ()
    if isinstance(history, str) or not isinstance(history, Sequence):
        fail("history", show(history), "a list of [instruction, output]", "history is not a list of pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            fail(f"history[{i}]", show(pair), "[instruction, output]", "history is not a list of pairs")
        messages.append(Message("user", parse_text(pair[0], f"history[{i}][0]")))
        messages.append(Message("assistant", parse_text(pair[1], f"history[{i}][1]")))
    extra = row.get("input")
    question = parse_text(row.get("instruction"), "instruction")
    if extra is not None and not (isinstance(extra, str) and not extra.strip()):
        question += "\n\n" + parse_text(extra, "input")
    return [*messages, Message("user", question), Message("assistant", parse_text(row.get("output"), "output"))]


_MESSAGES_OF: dict[RowShape, Callable[[Mapping[str, Any]], list[Message]]] = {
    RowShape.messages: _from_messages,
    RowShape.sharegpt: _from_sharegpt,
    RowShape.prompt_completion: _from_prompt_completion,
    RowShape.alpaca: _from_alpaca,
}


# --- the row as a whole -----------------------------------------------------------------------------


def _row_id(row: Mapping[str, Any], fallback: str) -> str:
    value = row.get("id")
    if value is None or value == "":
        return fallback
    if isinstance(value, bool) or not isinstance(value, str | int):
        fail("id", show(value), "text or a whole number", "id is not text")
    return encodable(str(value), "id")


def _tags(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = row.get("tags")
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        required = "a list of words (text with commas is schema_version 1: give the row or its source that)"
        fail("tags", show(value), required, "tags are not a list")
    if not isinstance(value, Sequence) or not all(isinstance(tag, str) and tag.strip() for tag in value):
        fail("tags", show(value), "a list of words", "tags are not a list")
    return tuple(dict.fromkeys(encodable(tag, "tags").strip() for tag in value))


def _label_origin(row: Mapping[str, Any]) -> str | None:
    value = row.get("label_origin")
    if value is None:
        return None
    if not isinstance(value, str) or not is_label_origin(value):
        fail("label_origin", show(value), f"{HUMAN} | {SYNTHETIC}MODEL", "unknown label origin")
    return encodable(value, "label_origin")


def is_label_origin(text: str) -> bool:
    """Whether a text is `human` or `synthetic:MODEL`."""
    model = text.removeprefix(SYNTHETIC)
    return text == HUMAN or (model != text and bool(model) and model == model.strip())


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A `system` text beside the turns (sharegpt, alpaca) is the first message."""
    text = row.get("system")
    if text is None or (isinstance(text, str) and not text.strip()):
        return messages
    system = Message("system", parse_text(text, "system"))
    if messages and messages[0].role == "system":
        if messages[0].content == system.content:
            return messages
        fail("system", show(text), "one system prompt (the messages hold another)", "two system prompts")
    return (system, *messages)


def _check_order(messages: tuple[Message, ...]) -> None:
    before: str | None = None
    for i, message in enumerate(messages):
        if message.role not in FOLLOWS[before]:
            given = f"{message.role} " + (f"after {before}" if before else "first")
            fail(f"messages[{i}].role", given, " or ".join(FOLLOWS[before]) + " there", f"wrong role order: {given}")
        before = message.role
    if not any(message.role == "assistant" for message in messages):
        fail("messages", f"{len(messages)} messages without an assistant turn", "at least one", "no assistant turn")
