"""What users said in the rows that a model was trained and validated on, read back from their tokens.

A store holds rendered conversations. Where a template's user turns begin and end is found by rendering words that
stand nowhere else, and proven on that render, before any row is looked at. Where a template does not tell, the
validation rows are read, which a store holds as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from sftdist.data.held_out import read_held_out
from sftdist.data.message import Message
from sftdist.data.render import CALLING, TOOL_SENTINEL, Unproven, sentinel_messages, sentinel_tool
from sftdist.data.rowset import as_keys
from sftdist.data.store import SPLITS, TRAIN, VALIDATION, TokenStore
from sftdist.data.template import ChatTemplate
from sftdist.evals.profile import ProfiledPrompt

MOST_ROWS = 10_000
_SYSTEM, _FIRST, _ANSWER, _SECOND, _NEXT = (
    f"sentinel{word}turn" for word in ("system", "first", "answer", "second", "next")
)


@dataclass(frozen=True)
class UserTurns:
    """How user turns are told in rendered text. `not_said`: what such turns begin with that a user did not say (the
    result of a tool, the list of tools). `with_system`: the system message stands in the first user turn."""

    opening: str
    closing: str
    not_said: tuple[str, ...] = ()
    with_system: bool = False

    @classmethod
    def of(cls, template: ChatTemplate) -> UserTurns | None:
        """None for a template whose user turns nothing marks."""
        messages = [Message("user", _FIRST), Message("assistant", _ANSWER)]
        messages += [Message("user", _SECOND), Message("assistant", _NEXT)]
        try:
            text = template.render(messages)
            asked = template.render(messages[:3], add_generation_prompt=True)
        except Unproven:
            return None
        before, rest = text.split(_FIRST)
        after_first, rest = rest.split(_ANSWER)
        between, rest = rest.split(_SECOND)
        after_second, after_prompt = rest.split(_NEXT)[0], asked.split(_SECOND)[1]
        ahead = _ahead_with_system(template, messages)
        openings = [_common_end([before, between, *more]) for more in ([ahead] if ahead else [], [])]
        closing = _common_start([after_first, after_second, after_prompt])
        for opening in openings:  # the shorter one holds for more conversations
            found = cls(opening, closing, with_system=_SYSTEM in ahead and opening is not openings[0])
            if opening.strip() and closing.strip() and found.read(text) == [_FIRST, _SECOND]:
                return replace(found, not_said=tuple(found._not_said(template)))
        return None

    def read(self, text: str) -> list[str]:
        """What the user says in rendered text, turn by turn."""
        turns = re.findall(f"{re.escape(self.opening)}(.*?){re.escape(self.closing)}", text, re.DOTALL)
        return [turn for turn in turns if turn.strip() and not turn.startswith(self.not_said)]

    def _not_said(self, template: ChatTemplate) -> Iterator[str]:
        messages, _ = sentinel_messages(CALLING)
        question, result = messages[0].content, messages[2].content
        try:
            text = template.render(messages, tools=[sentinel_tool()])
        except Unproven:
            return
        for turn in self.read(text):
            if result in turn:
                yield turn.split(result)[0]
            elif question in turn and turn != question:
                yield turn.split(TOOL_SENTINEL)[0].split("{")[0]


def _ahead_with_system(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """What stands before the first user message where there is a system message; "" where there cannot be one."""
    try:
        return template.render([Message("system", _SYSTEM), *messages]).split(_FIRST)[0]
    except Unproven:
        return ""


def _common_start(texts: Sequence[str]) -> str:
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in same)


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


def prompts_of(stores: Sequence[TokenStore], template: ChatTemplate, most: int = MOST_ROWS) -> list[ProfiledPrompt]:
    """The user turns of at most `most` train and validation rows of all stores, chosen by a hash of their content.

    Each conversation counts once, each store as much as it has rows.
    """
    turns = UserTurns.of(template)
    found: list[ProfiledPrompt] = []
    if turns is not None and not (turns.with_system and any(map(_has_system, stores))):
        for store, row in _chosen(stores, most):
            found += [ProfiledPrompt(turn, store.name) for turn in turns.read(_decoded(store, row, template))]
    return found or [ProfiledPrompt(text, store.name) for store in stores for text in _validated(store)]


def _decoded(store: TokenStore, row: int, template: ChatTemplate) -> str:
    ids = store.tokens(row)[0].tolist()
    return str(template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _has_system(store: TokenStore) -> bool:
    return any(row.conversation.messages[0].role in ("system", "developer") for row in read_held_out(store.path))


def _validated(store: TokenStore) -> Iterator[str]:
    rows = (row for row in read_held_out(store.path) if row.split == SPLITS[VALIDATION])
    return (message.content for row in rows for message in row.conversation.messages if message.role == "user")


def _chosen(stores: Sequence[TokenStore], most: int) -> Iterator[tuple[TokenStore, int]]:
    """Rows with the least digests of content."""
    rows = [_longest_rows(store) for store in stores]
    keys = np.concatenate([as_keys(store.contents[own]) for store, own in zip(stores, rows, strict=True)])
    owners = np.repeat(np.arange(len(stores)), [len(own) for own in rows])
    places = np.concatenate(rows)
    for i in np.argsort(keys, kind="stable")[:most]:
        yield stores[owners[i]], int(places[i])


def _longest_rows(store: TokenStore) -> NDArray[np.int64]:
    """One row a conversation: of its turns, each a row, the last has all that came before."""
    rows = np.flatnonzero((store.split == TRAIN) | (store.split == VALIDATION))
    keys = as_keys(store.contents[rows])
    order = np.lexsort((store.lengths[rows], keys))
    last = np.append(keys[order][1:] != keys[order][:-1], True)[: len(order)]
    return np.sort(rows[order[last]])
