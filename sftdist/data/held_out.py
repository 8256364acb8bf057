"""The conversations of a store that are not trained on, as text: what an evaluation asks a model.

A line of JSON each in `held_out.jsonl` beside the columns: `split`, the digests `prompt` and `content` in hex, and the
conversation as it went into the store, after normalising.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftdist.core.storage import read_jsonl
from sftdist.data.message import Message
from sftdist.data.schema import Conversation

HELD_OUT = "held_out.jsonl"
_NOTHING = asdict(Message("", ""))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One of them; `split` is `validation` or `holdout`, `prompt` and `content` are digests (`data.keys`) in hex."""

    split: str
    prompt: str
    content: str
    conversation: Conversation


def to_json(conversation: Conversation) -> dict[str, Any]:
    """What `from_json` reads; fields that say nothing are left out."""
    return {
        "id": conversation.id,
        "messages": [message_to_json(message) for message in conversation.messages],
        "tools": list(conversation.tools),
        "tags": list(conversation.tags),
        "label_origin": conversation.label_origin,
        "checks": conversation.checks,
    }


def from_json(row: Mapping[str, Any]) -> Conversation:
    """The conversation that `to_json` was given, without its place."""
    return Conversation(
        id=row["id"],
        messages=tuple(message_from_json(message) for message in row["messages"]),
        tools=tuple(row["tools"]),
        tags=tuple(row["tags"]),
        label_origin=row["label_origin"],
        checks=row["checks"],
    )


def read_held_out(store: Path) -> Iterator[HeldOut]:
    """All of a store, in the order of its rows."""
    for row in read_jsonl(store / HELD_OUT):
        yield HeldOut(row["split"], row["prompt"], row["content"], from_json(row))


def message_to_json(message: Message) -> dict[str, Any]:
    """A message as a row has it; but for role and content, fields that say nothing are left out."""
    given = asdict(message)
    return {key: value for key, value in given.items() if key in ("role", "content") or value != _NOTHING[key]}


def message_from_json(message: Mapping[str, Any]) -> Message:
    """The message that `message_to_json` was given, also where it has been in a file."""
    return Message(**{**message, "tool_calls": tuple(message.get("tool_calls", ()))})
