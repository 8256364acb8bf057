"""Cleaning: what is changed in a conversation before it is rendered."""

from __future__ import annotations

from dataclasses import replace

from sftdist.data.schema import Conversation, Message

CLEAN_VERSION = 1


def normalise(conversation: Conversation) -> Conversation:
    """Line ends become `\\n`; nothing else in a text is touched, for the model is trained on what was written."""
    if not any("\r" in m.content or "\r" in (m.reasoning or "") for m in conversation.messages):
        return conversation
    return replace(conversation, messages=tuple(map(_with_line_ends, conversation.messages)))


def _with_line_ends(m: Message) -> Message:
    return replace(m, content=_line_ends(m.content), reasoning=None if m.reasoning is None else _line_ends(m.reasoning))


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
