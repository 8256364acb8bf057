"""What makes two conversations, two prompts or two answers the same: digests of what is compared."""

from __future__ import annotations

import hashlib
import json
import unicodedata

from sftdist.data.schema import Conversation, Message

DIGEST_BYTES = 16
TOOLS_BYTES = 4  # of an answer's key


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
    """What answers the prompt of `prompt_key`: `TOOLS_BYTES` of a digest of the tools that could be used, the rest of
    one of the first assistant turn; white space as there."""
    first = next(message for message in conversation.messages if message.role == "assistant")
    parts = [" ".join(comparable(first.content).split()), list(first.tool_calls)]
    tools, answer = (
        digest(json.dumps(part, ensure_ascii=False, sort_keys=True)) for part in (conversation.tools, parts)
    )
    return tools[:TOOLS_BYTES] + answer[TOOLS_BYTES:]


def comparable(text: str) -> str:
    return text.strip() if text.isascii() else unicodedata.normalize("NFC", text).strip()


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _message_key(m: Message) -> list[object]:
    reasoning = None if m.reasoning is None else comparable(m.reasoning)
    extra = [reasoning, list(m.tool_calls), m.name, m.tool_call_id, m.train, m.weight]
    plain = extra == [None, [], None, None, None, 1.0]
    return [m.role, comparable(m.content)] if plain else [m.role, comparable(m.content), *extra]
