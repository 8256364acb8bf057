"""Where in the render the assistant turns are: found by rendering prefixes, never by searching for text.

For assistant turn i of a conversation three renders settle it:

    full      = render(messages)                                  what is trained
    prompt    = render(messages[:i], add_generation_prompt=True)  what the serving engine will send
    turn_last = render(messages[:i+1])                            the turn as the model has to emit it

The span starts at `len(prompt)`, which must be a prefix of the other two. It ends where `turn_last` ends, less what
follows the end-of-turn marker, and `full` must agree with `turn_last` up to there. So a template that rewrites
history (removes `<think>`, writes another end marker) is seen at once, whatever the text of the messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftdist.data.message import Message
from sftdist.data.render import RENDER_ERRORS, Dialect, Renderer, Unproven, as_dict

# What a marker or a header is made of: white space, <control>, [CONTROL], or a run of other text.
UNIT = re.compile(r"\s+|<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<\[]+|.", re.DOTALL)
USE_INSTEAD = "use data.train_on=last or data.expand_turns=true"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of the text that assistant turn `turn` (counted from 0) is trained on."""

    start: int
    end: int
    turn: int
    weight: float


@dataclass(frozen=True, slots=True)
class Closing:
    """What a template writes after the content of the last assistant turn: the marker, then an untrained tail."""

    marker: str  # what the model must emit to end its turn, e.g. "<|im_end|>"
    tail: str  # what follows it without being emitted, e.g. "\n", or Phi-3's "\n<|endoftext|>"
    header: str  # what the generation prompt adds, e.g. "<|im_start|>assistant\n"; "" in templates like "[INST] ..."

    @property
    def text(self) -> str:
        return self.marker + self.tail


def find_closing(renderer: Renderer) -> Closing:
    """Derive the end-of-turn marker from the template: what follows the content of a turn, last or not.

    A turn in the middle is followed by the marker and the next header, the last one by the marker and perhaps
    something that ends the whole conversation; the marker is what both have in common (whole units, so that two
    headers beginning with the same bracket are not cut in the middle). A template with nothing in common, like
    gpt-oss (`<|return|>` at the end, `<|end|>` before), ends a turn with what it writes at the end.
    """
    question, answer, next_question = (
        Message(role, f"sentinel{i}x") for i, role in enumerate(("user", "assistant", "user"))
    )
    dialect = renderer.dialect([question, answer], tools=False)
    last = renderer.render([as_dict(m, dialect) for m in (question, answer)], ())
    at_end = last[last.rindex(answer.content) + len(answer.content) :]
    try:
        middle = renderer.raw([as_dict(m, dialect) for m in (question, answer, next_question)], ())
    except RENDER_ERRORS:  # a template of one exchange
        middle = last
    followed = middle[middle.index(answer.content) + len(answer.content) :]
    marker = _common_units(at_end, followed).rstrip() or at_end.rstrip()
    if not marker:
        raise Unproven(
            "no end-of-turn marker",
            "the template writes nothing after the last assistant turn, so the model would never learn to stop; "
            "give a template that ends the turn (model.chat_template=chatml|llama3|FILE)",
        )
    return Closing(marker, at_end[len(marker) :], _find_header(renderer, dialect, question, answer))


def _find_header(renderer: Renderer, dialect: Dialect, question: Message, answer: Message) -> str:
    """What `add_generation_prompt` adds; a template with a header that it does not add would have it trained."""
    dicts = [as_dict(question, dialect), as_dict(answer, dialect)]
    prompt = renderer.render(dicts[:1], (), prompt=True)
    try:
        history = renderer.raw(dicts[:1], ())
    except RENDER_ERRORS:
        return ""
    header = prompt[len(_common_units(prompt, history)) :]
    whole = renderer.render(dicts, ())
    written = whole[len(prompt) : whole.rindex(answer.content)].strip() if whole.startswith(prompt) else ""
    if not header.strip() and written:
        given = f"add_generation_prompt adds nothing, though an assistant turn begins with {written!r}"
        advice = "the model would be trained to write the header; use a template that adds it to the prompt"
        raise Unproven("template has no generation prompt", f"{given}: {advice}")
    return header


def _common_units(text: str, other: str) -> str:
    end = 0
    for unit in UNIT.finditer(text):
        if not other.startswith(unit.group(), unit.start()):
            break
        end = unit.end()
    return text[:end]


@dataclass(frozen=True, slots=True)
class Turn:
    """One located assistant turn: `completion` is what the model has to emit after `prompt`, tail included."""

    index: int  # of the message
    number: int  # of the assistant turn
    prompt: str
    completion: str
    end: int  # length of the supervised part of `completion`


class Locator:
    """The renders of one conversation (or of the part of it up to one turn)."""

    def __init__(
        self,
        renderer: Renderer,
        closing: Closing,
        stop_texts: Sequence[str],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self.renderer, self.closing, self.stop_texts = renderer, closing, stop_texts
        self.messages, self.tools = messages, tools
        self.dialect: Dialect = renderer.dialect(messages, tools=bool(tools))
        self.dicts = [as_dict(m, self.dialect) for m in messages]
        self.text = renderer.render(self.dicts, tools)

    def locate(self, index: int, number: int) -> Turn:
        """Find the assistant turn at message `index`; `Unproven` when the text is not what serving will see."""
        prompt = self.renderer.render(self.dicts[:index], self.tools, prompt=True)
        is_last = index == len(self.dicts) - 1
        turn_last = self.text if is_last else self.renderer.render(self.dicts[: index + 1], self.tools)
        if not turn_last.startswith(prompt):
            raise self._wrong_prompt(index, number, prompt, turn_last)
        header = self.closing.header.strip()
        if header and turn_last[len(prompt) :].lstrip().startswith(header):
            given = f"serving sends {prompt[-40:]!r} and the turn begins with the header {header!r}"
            raise Unproven(f"generation prompt lacks {header}", f"{given}; the header would be trained", number)
        end = self._end(turn_last, index, number)
        if end <= len(prompt):
            raise Unproven("empty turn", f"nothing follows the generation prompt {prompt[-40:]!r}", number)
        if not is_last and self.text[:end] != turn_last[:end]:
            raise self._rewritten(number, prompt, turn_last)
        return Turn(index, number, prompt, turn_last[len(prompt) :], end - len(prompt))

    def _end(self, turn_last: str, index: int, number: int) -> int:
        if turn_last.endswith(self.closing.text):
            return len(turn_last) - len(self.closing.tail)
        if self.messages[index].tool_calls:
            text = turn_last.rstrip()
            if text.endswith(tuple(self.stop_texts)):
                return len(text)
            given = f"a turn with tool calls ends with {text[-30:]!r}"
            raise Unproven(
                "no end-of-turn marker after a tool call",
                f"{given}, which is neither the template's marker {self.closing.marker!r} nor one of the stop "
                f"tokens {list(self.stop_texts)}; list it as eos_token_id in the model's generation_config.json",
                number,
            )
        given = f"the turn ends with {turn_last[-30:]!r}, not with {self.closing.text!r}"
        raise Unproven("no end-of-turn marker", given, number)

    def _wrong_prompt(self, index: int, number: int, prompt: str, turn_last: str) -> Unproven:
        """Serving would send something else than what stands before the turn: the header, or the history."""
        at = common_length(prompt, turn_last)
        sent, given = (repr(text[max(0, at - 30) : at + 50]) for text in (prompt, turn_last))
        detail = f"serving sends {sent}, the rendered turn has {given}"
        try:
            history = common_length(self.renderer.raw(self.dicts[:index], self.tools), prompt)
        except RENDER_ERRORS:  # a template that does not end with a user message
            history = len(prompt)
        if at < history:
            construct = construct_at(prompt, at) or construct_at(turn_last, at)
            return Unproven(f"history is rewritten at {construct}", f"{detail}; {USE_INSTEAD}", number)
        advice = "give the turn what the prompt begins (reasoning), or use a template whose turns repeat its prompt"
        added = [unit.group() for unit in UNIT.finditer(prompt, history) if unit.group().strip()]
        return Unproven(f"generation prompt adds {added[-1] if added else sent}", f"{detail}; {advice}", number)

    def _rewritten(self, number: int, prompt: str, turn_last: str) -> Unproven:
        """The turn stands in the history in another form than the one that the model has to emit."""
        at = common_length(self.text, turn_last)
        construct = construct_at(turn_last, at) or construct_at(self.text, at)
        in_history, emitted = (repr(t[max(0, at - 30) : at + 50]) for t in (self.text, turn_last))
        what = "the prompt of turn" if at < len(prompt) else "turn"
        detail = f"{what} {number} is {emitted} when it is the last and {in_history} in the history; {USE_INSTEAD}"
        return Unproven(f"history is rewritten at {construct}", detail, number)


def common_length(a: str, b: str) -> int:
    """Length of the common prefix."""
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    low, high = 0, min(len(a), len(b))
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


def construct_at(text: str, at: int) -> str:
    """The unit of the template that begins or lies at a character, or the first control word after it."""
    units = [m for m in UNIT.finditer(text[max(0, at - 40) : at + 60]) if m.end() + max(0, at - 40) > at]
    control = next((m.group() for m in units if m.group()[0] in "<["), None)
    return control or next((m.group()[:30] for m in units if m.group().strip()), "")
