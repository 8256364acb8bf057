"""What is trained, token by token: the object that `inspect` prints, one per conversation.

Other tools read it: keys are added, never renamed. See `explain` for their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftdist.data.mask import MaskOptions, Refusal, with_reasoning
from sftdist.data.message import Message
from sftdist.data.schema import Conversation
from sftdist.data.spans import common_length
from sftdist.data.template import ChatTemplate
from sftdist.data.tokens import Sample, Tokens


def explain(template: ChatTemplate, conversation: Conversation, options: MaskOptions) -> list[dict[str, Any]]:
    """One object, or one per trained turn with `expand_turns`.

    `id`: the row's own (with `#turn` when expanded). `text`: the render. `tokens`: id, text, start and end (characters
    of `text`), role, turn (the number of the assistant turn, from 0, that it is in or leads to), supervised, weight.
    `supervised_text`: per assistant turn what is trained, "" where nothing is. `refused`: null, or why not; then
    nothing is supervised, and `text` is "" if the template does not render the conversation at all.
    """
    return [_object(template, conversation, entry, options) for entry in template.samples(conversation, options)]


def _object(
    template: ChatTemplate, conversation: Conversation, entry: Sample | Refusal, options: MaskOptions
) -> dict[str, Any]:
    messages = with_reasoning(_messages_of(entry, conversation), options.reasoning)
    refused: str | None = None
    if isinstance(entry, Sample):
        found = template.tokenise([entry])[0]
        if isinstance(found, Tokens):
            return _line(template, conversation, messages, entry, found, None)
        refused = str(found)
    else:
        refused = str(entry)
    shown = Sample(entry.id, template.preview(messages, conversation.tools), ())
    tokens = Tokens(template.ids(shown.text), [])
    return _line(template, conversation, messages, shown, tokens, refused)


def _messages_of(entry: Sample | Refusal, conversation: Conversation) -> Sequence[Message]:
    """The messages that an entry renders: all, or with `expand_turns` those up to its turn."""
    turn = entry.id.removeprefix(f"{conversation.id}#")
    if turn == entry.id:
        return conversation.messages
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    return conversation.messages[: turns[int(turn)] + 1]


def _line(
    template: ChatTemplate,
    conversation: Conversation,
    messages: Sequence[Message],
    sample: Sample,
    tokens: Tokens,
    refused: str | None,
) -> dict[str, Any]:
    weights = [0.0] * len(tokens.ids)
    for span, (start, end) in zip(sample.spans, tokens.ranges, strict=True):
        weights[start:end] = [span.weight] * (end - start)
    regions = _regions(template, conversation, messages, sample)
    region = 0
    lines = []
    for id, (start, end), weight in zip(tokens.ids, template.offsets(sample, tokens), weights, strict=True):
        while region < len(regions) - 1 and end > regions[region][0]:
            region += 1
        role, turn = regions[region][1:] if regions else ("", 0)
        lines.append(
            {
                "id": id,
                "text": sample.text[start:end],
                "start": start,
                "end": end,
                "role": role,
                "turn": turn,
                "supervised": weight > 0,
                "weight": weight,
            }
        )
    supervised = ["" for message in messages if message.role == "assistant"]
    for span in sample.spans:
        supervised[span.turn] = sample.text[span.start : span.end]
    return {"id": sample.id, "text": sample.text, "tokens": lines, "supervised_text": supervised, "refused": refused}


def _regions(
    template: ChatTemplate, conversation: Conversation, messages: Sequence[Message], sample: Sample
) -> list[tuple[int, str, int]]:
    """Per message: where its part of the text ends, its role, the assistant turn it is in or leads to.

    For display only: where the render of a part of the messages fails or is rewritten later, a border is the last
    character that both have in common. The spans of trained turns are exact.
    """
    exact = {span.turn: span.end for span in sample.spans}
    regions, end, turn = [], 0, 0
    for i, message in enumerate(messages):
        part = template.preview(messages[: i + 1], conversation.tools)
        end = max(end, common_length(part, sample.text))
        if message.role == "assistant":
            end = max(end, exact.get(turn, 0))
        regions.append((end, message.role, turn))
        turn += message.role == "assistant"
    return regions
