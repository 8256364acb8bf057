"""What makes two conversations, two prompts or two answers the same: digests of what is compared."""

from __future__ import annotations

import hashlib
import json
import unicodedata

from sftdist.data.schema import Conversation, Message

DIGEST_BYTES = 16


def content_key(conversation: Conversation) -> bytes:
    """A digest that two conversations share exactly when they are duplicates.

    Compared is everything that is trained on, after Unicode composition (NFC) and without outer white
    space; ids, tags and provenance are not.
    """
    parts = [[_message_key(m) for m in conversation.messages], list(conversation.tools)]
    return digest(json.dumps(parts, ensure_ascii=False, sort_keys=True))


def prompt_key(conversation: Conversation) -> bytes:
    """Digest of all messages before the first assistant turn; runs of white space count as one space."""
    parts: list[str] = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        parts += (message.role, " ".join(comparable(message.content).split()))
    return digest("\x00".join(parts))


def answer_key(conversation: Conversation) -> bytes:
    """Digest of the first assistant turn, what answers the prompt of `prompt_key`; white space as there."""
    first = next(message for message in conversation.messages if message.role == "assistant")
    parts = [" ".join(comparable(first.content).split()), list(first.tool_calls)]
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
