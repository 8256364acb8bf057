"""Cleaning: what is changed in a conversation before it is rendered, and which conversations are the same."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import replace

from sftdist.data.schema import Conversation, Message

CLEAN_VERSION = 1
DIGEST_BYTES = 16


def normalise(conversation: Conversation) -> Conversation:
    """Line ends become `\\n`; nothing else in a text is touched, for the model is trained on what was written."""
    if not any("\r" in m.content or "\r" in (m.reasoning or "") for m in conversation.messages):
        return conversation
    return replace(conversation, messages=tuple(map(_with_line_ends, conversation.messages)))


def content_key(conversation: Conversation) -> bytes:
    """A digest that two conversations share exactly when they are duplicates.

    Compared is everything that is trained on, after Unicode composition (NFC) and without outer white
    space; ids, tags and provenance are not.
    """
    parts = [[_message_key(m) for m in conversation.messages], list(conversation.tools)]
    return digest(json.dumps(parts, ensure_ascii=False, sort_keys=True))


def comparable(text: str) -> str:
    return text.strip() if text.isascii() else unicodedata.normalize("NFC", text).strip()


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _message_key(m: Message) -> list[object]:
    reasoning = None if m.reasoning is None else comparable(m.reasoning)
    extra = [reasoning, list(m.tool_calls), m.name, m.tool_call_id, m.train, m.weight]
    plain = extra == [None, [], None, None, None, 1.0]
    return [m.role, comparable(m.content)] if plain else [m.role, comparable(m.content), *extra]


def _with_line_ends(m: Message) -> Message:
    return replace(m, content=_line_ends(m.content), reasoning=None if m.reasoning is None else _line_ends(m.reasoning))


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
