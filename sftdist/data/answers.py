"""The answers of a conversation: what is trained of it, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sftdist.core.settings import TrainOn
from sftdist.data.mask import trained_turns
from sftdist.data.render import Unproven
from sftdist.data.schema import Conversation


class Answer(NamedTuple):
    """An assistant turn: its number (from 0), the place of its message, and its content."""

    turn: int
    place: int
    text: str


def trained_answers(conversation: Conversation, train_on: TrainOn) -> Iterator[Answer]:
    """The assistant turns that are trained and say something; one of tool calls alone does not."""
    try:
        turns = trained_turns(conversation.messages, train_on)
    except Unproven:
        return  # nothing is trained: the row is refused, and that is said there
    for turn, place in turns.items():
        message = conversation.messages[place]
        if message.content or not message.tool_calls:
            yield Answer(turn, place, message.content)
