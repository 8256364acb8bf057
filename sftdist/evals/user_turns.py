"""What users said in the rows that a model was trained and validated on, read back from their tokens.

A store holds rendered conversations. Where a template's user turns begin and end is found by rendering words that
stand nowhere else, and proven on that render, before any row is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from sftdist.data.message import Message
from sftdist.data.render import CALLING, Unproven, sentinel_messages, sentinel_tool
from sftdist.data.rowset import as_keys
from sftdist.data.store import TRAIN, VALIDATION, TokenStore
from sftdist.data.template import ChatTemplate
from sftdist.evals.profile import ProfiledPrompt

MOST_ROWS = 10_000
_FIRST, _ANSWER, _SECOND, _NEXT = (f"sentinel{word}turn" for word in ("first", "answer", "second", "next"))


@dataclass(frozen=True)
class UserTurns:
    """How user turns are told in rendered text. `tool`: what stands first in those that hold a tool's result."""

    opening: str
    closing: str
    tool: str

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
        opening = _common([before[::-1], between[::-1]])[::-1]
        found = cls(opening, _common([after_first, after_second, after_prompt]), "")
        if not opening.strip() or not found.closing.strip() or found.read(text) != [_FIRST, _SECOND]:
            return None
        return cls(found.opening, found.closing, found._tool_mark(template))

    def read(self, text: str) -> list[str]:
        """What the user says in rendered text, turn by turn."""
        turns = re.findall(f"{re.escape(self.opening)}(.*?){re.escape(self.closing)}", text, re.DOTALL)
        return [turn for turn in turns if turn.strip() and not (self.tool and turn.startswith(self.tool))]

    def _tool_mark(self, template: ChatTemplate) -> str:
        """Some templates give the result of a tool as a user's turn, with a mark in front."""
        messages, _ = sentinel_messages(CALLING)
        result = messages[2].content
        try:
            text = template.render(messages, tools=[sentinel_tool()])
        except Unproven:
            return ""
        turns = [turn for turn in self.read(text) if result in turn]
        return turns[0].split(result)[0] if turns else ""


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(characters[0] for characters in same)


def prompts_of(stores: Sequence[TokenStore], template: ChatTemplate, most: int = MOST_ROWS) -> list[ProfiledPrompt]:
    """The user turns of at most `most` train and validation rows of all stores, chosen by a hash of their content.

    Each conversation counts once, each store as much as it has rows. Empty where the template does not mark them.
    """
    turns = UserTurns.of(template)
    if turns is None:
        return []
    decode = template.tokenizer.decode
    found: list[ProfiledPrompt] = []
    for store, row in _chosen(stores, most):
        text = str(decode(store.tokens(row)[0].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        found += [ProfiledPrompt(turn, store.name) for turn in turns.read(text)]
    return found


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
