"""The answers of a conversation: what is trained of it, as text."""

from __future__ import annotations

from collections.abc import Iterator

from sftdist.core.settings import TrainOn
from sftdist.data.mask import trained_turns
from sftdist.data.render import Unproven
from sftdist.data.schema import Conversation


def trained_answers(conversation: Conversation, train_on: TrainOn) -> Iterator[tuple[int, str]]:
    """The number (from 0) and the content of each assistant turn that is trained; one of tool calls alone has none."""
    try:
        turns = trained_turns(conversation.messages, train_on)
    except Unproven:
        return  # nothing is trained: the row is refused, and that is said there
    for number, place in turns.items():
        message = conversation.messages[place]
        if message.content or not message.tool_calls:
            yield number, message.content
