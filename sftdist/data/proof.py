"""The proof that a located turn is the message and nothing else, and that no field of the row is lost.

Nothing here trusts the template: each text is looked for in the place where it has to be, and a frame (what the
template writes around a message) is accepted once it was seen not to change with the text of the other messages.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sftdist.data.message import Message
from sftdist.data.render import DROPPED_ADVICE, Unproven, as_dict
from sftdist.data.spans import Locator, Turn

MAX_FRAMES = 4096
OTHER_TEXT = "counterfactual"


def prove_turn(found: Locator, turn: Turn, frames: set[str]) -> None:
    """Prove that the supervised part of a turn holds its message, whole, in order, and no other message's text.

    `frames` remembers the frames that were proven already; a new one costs two more renders.
    """
    message, span = found.messages[turn.index], turn.completion[: turn.end]
    _require_no_stop(found, message, turn.number)
    if message.tool_calls:
        _prove_calls(message, span, turn.number)
        _prove_alone(found, turn)
        return
    content = message.content
    body = span.removesuffix(found.closing.marker)
    if not body.endswith(content):
        body = body.rstrip()  # white space that the template writes before the marker
        if not body.endswith(content):
            raise _not_held("content", content, span, turn.number)
    frame = body[: len(body) - len(content)]
    if message.reasoning is not None:
        reasoning = message.reasoning.strip()
        if reasoning not in frame:
            raise _not_held("reasoning", reasoning, span, turn.number)
        frame = frame.replace(reasoning, "\0", 1)
    if frame not in frames:
        _prove_alone(found, turn)
        if len(frames) < MAX_FRAMES:
            frames.add(frame)


def _require_no_stop(found: Locator, message: Message, number: int) -> None:
    """A token that ends a turn, written inside one, would train the model to stop there."""
    for stop in found.stop_texts:
        if stop in message.content or stop in (message.reasoning or ""):
            given = f"turn {number} holds the end-of-turn marker {stop!r} in its own text"
            advice = "it would train the model to stop there; take it out, or set `train: false` for that turn"
            raise Unproven("end-of-turn marker inside a message", f"{given}: {advice}", number)


def _prove_calls(message: Message, span: str, number: int) -> None:
    for what, text in (("content", message.content), ("reasoning", (message.reasoning or "").strip())):
        if text not in span:
            raise _not_held(what, text, span, number)
    for text in _call_texts(message):
        if not any(form in span for form in written_forms(text)):
            raise _not_held("tool call", text, span, number)


def _not_held(what: str, text: str, span: str, number: int) -> Unproven:
    if what == "content" and text.strip() in span:
        reason = "template strips white space of an answer"
        detail = (
            f"turn {number} is {_short(text)}, its render {_short(span)}; data.normalise.template_trim=true strips it"
        )
        return Unproven(reason, f"{detail} first, and counts it", number)
    if what == "content" and "</think>" in text:
        advice = "the template moves or removes the thinking in it: give that in the field `reasoning_content`"
    elif what == "reasoning":
        advice = "use data.reasoning=drop or a template that renders it"
    elif what == "tool call":
        advice = "the template drops or changes it, or takes it from the call's id (`functions.NAME:0`): give that"
    else:
        advice = "the template drops or changes it: use a template that renders it as it is"
    detail = f"the {what} of turn {number} is {_short(text)}, its render {_short(span)}; {advice}"
    return Unproven(f"{what} is not in the rendered turn", detail, number)


def _prove_alone(found: Locator, turn: Turn) -> None:
    """The turn must not change when the text of all other messages does."""
    others = [
        m if i == turn.index else replace(m, content=f"{OTHER_TEXT} {i}" if m.content else "")
        for i, m in enumerate(found.messages[: turn.index + 1])
    ]
    try:
        _, completion = found.emitted(turn.index, turn.number, [as_dict(m, found.dialect) for m in others])
    except Unproven as problem:
        raise Unproven(
            "turn depends on other messages", f"with other texts around it: {problem}", turn.number
        ) from problem
    if completion != turn.completion:
        given = f"{_short(turn.completion)} becomes {_short(completion)} when the other messages change"
        raise Unproven("turn depends on other messages", given, turn.number)


def prove_fields(found: Locator, trained: Collection[int]) -> None:
    """Every field that is not proven in a trained turn must stand somewhere in the render.

    Reasoning of turns that are not trained may be missing: the template drops it at inference as well.
    """
    for i, message in enumerate(found.messages):
        if i in trained:
            continue
        texts = [message.content.strip(), *_call_texts(message)]
        if message.role == "assistant" and "</think>" in message.content:
            texts[0] = message.content.rpartition("</think>")[2].strip()
        _find_all(found.text, texts, f"the {message.role} message {i}")
    if found.tools:
        _find_all(found.text, list(_tool_texts(found.tools)), "the tools")


def _find_all(rendered: str, texts: Sequence[str], where: str) -> None:
    for text in texts:
        if text not in rendered and not any(form in rendered for form in written_forms(text)):
            given = f"{_short(text)} of {where} is not in the render"
            raise Unproven(f"template drops text of {where.rstrip('0123456789 ')}", f"{given}; {DROPPED_ADVICE}")


def written_forms(text: str) -> Iterator[str]:
    """The ways in which templates write a text: as it is, trimmed, as JSON, in Python's single quotes."""
    yield text.strip()
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield json.dumps(text.strip(), ensure_ascii=False)[1:-1]
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    yield escaped
    yield escaped.replace("\n", "\\n").replace("\r", "\\r")


def _call_texts(message: Message) -> Iterator[str]:
    for call in message.tool_calls:
        yield call["function"]["name"]
        yield from _leaves(call["function"]["arguments"])


def _leaves(value: Any) -> Iterator[str]:
    """Keys and values of JSON, as text. True, false and null are too short and too variously written to look for."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _tool_texts(tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for tool in tools:
        function = tool.get("function", tool)
        yield from (str(function[key]) for key in ("name", "description") if function.get(key))
        parameters = function.get("parameters")
        yield from (parameters.get("properties") or {}) if isinstance(parameters, Mapping) else ()


def _short(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]}...{text[-70:]}")
