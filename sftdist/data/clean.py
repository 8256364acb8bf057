"""Cleaning: what is changed in a conversation before it is rendered, each rule by its name.

The text of a message is its content and its reasoning. Names, tool calls with their arguments, and tool definitions
are data of the user's program: no rule touches them.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, fields, replace

from sftdist.data.schema import Conversation, Message

CLEAN_VERSION = 2
BLANKS = " \t"


@dataclass(frozen=True, slots=True)
class Rules:
    """Which rules apply, in the order in which they do.

    line_ends: `\\r\\n` and `\\r` become `\\n`. unicode_nfc: composed characters (NFC). trailing_blanks: blanks and tabs
    at the end of a line go, also of the last one. template_trim: the outer white space of a content goes where the
    template strips it anyway, so that the text is what the model is trained on.
    """

    line_ends: bool = True
    unicode_nfc: bool = True
    trailing_blanks: bool = True
    template_trim: bool = True


RULES = tuple(field.name for field in fields(Rules))


def normalise(
    conversation: Conversation, rules: Rules, trimmed_roles: frozenset[str] = frozenset()
) -> tuple[Conversation, tuple[str, ...]]:
    """The conversation as it is used, and the names of the rules that changed something in it.

    `trimmed_roles` are the roles whose outer white space the chat template strips. What needs no change, which is
    most of what there is, is the very same object.
    """
    if not any(_may_change(message, rules, trimmed_roles) for message in conversation.messages):
        return conversation, ()
    used: set[str] = set()
    messages = tuple(_normalised(message, rules, trimmed_roles, used) for message in conversation.messages)
    if not used:
        return conversation, ()
    return replace(conversation, messages=messages), tuple(rule for rule in RULES if rule in used)


def _may_change(m: Message, rules: Rules, trimmed_roles: frozenset[str]) -> bool:
    """Cheap and never wrong with a no."""
    text = m.content
    if rules.template_trim and m.role in trimmed_roles and (text[:1].isspace() or text[-1:].isspace()):
        return True
    return _text_may_change(text, rules) or (m.reasoning is not None and _text_may_change(m.reasoning, rules))


def _text_may_change(text: str, rules: Rules) -> bool:
    return (
        (rules.line_ends and "\r" in text)
        or (rules.unicode_nfc and not unicodedata.is_normalized("NFC", text))
        or (rules.trailing_blanks and _has_trailing_blanks(text))
    )


def _has_trailing_blanks(text: str) -> bool:
    return " \n" in text or "\t\n" in text or text.endswith((" ", "\t"))


def _normalised(m: Message, rules: Rules, trimmed_roles: frozenset[str], used: set[str]) -> Message:
    content = _clean(m.content, rules, used)
    if rules.template_trim and m.role in trimmed_roles:
        content = _note("template_trim", content, content.strip(), used)
    reasoning = None if m.reasoning is None else _clean(m.reasoning, rules, used)
    if content == m.content and reasoning == m.reasoning:
        return m
    return replace(m, content=content, reasoning=reasoning)


def _clean(text: str, rules: Rules, used: set[str]) -> str:
    if rules.line_ends and "\r" in text:
        text = _note("line_ends", text, text.replace("\r\n", "\n").replace("\r", "\n"), used)
    if rules.unicode_nfc and not text.isascii():
        text = _note("unicode_nfc", text, unicodedata.normalize("NFC", text), used)
    if rules.trailing_blanks and _has_trailing_blanks(text):
        # no regular expression: one takes quadratic time on a long run of blanks inside a line
        lines = "\n".join(line.rstrip(BLANKS) for line in text.split("\n"))
        text = _note("trailing_blanks", text, lines, used)
    return text


def _note(rule: str, before: str, after: str, used: set[str]) -> str:
    if after != before:
        used.add(rule)
    return after
