"""Where in the render the assistant turns are: found by rendering prefixes, never by searching for text.

For assistant turn i of a conversation three renders settle it:

    full      = render(messages)                                  what is trained
    prompt    = render(messages[:i], add_generation_prompt=True)  what the serving engine will send
    turn_last = render(messages[:i+1])                            the turn as the model has to emit it

The span starts at `len(prompt)`, which must be a prefix of the other two. It ends where `turn_last` ends, less what
follows the end-of-turn marker, and `full` must agree with `turn_last` up to there. So a template that rewrites
history (removes `<think>`, writes another end marker) is seen at once, whatever the text of the messages.

Two templates out of three render the last turn as the model has to emit it. The others lack something of it, which
is put in its place: the end of the turn, where only the header of the next message ends one (GLM: `<|user|>` is the
stop token), and what the generation prompt begins (`opening`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftdist.data.message import Message
from sftdist.data.opening import UNIT, find_opening
from sftdist.data.render import (
    CALLING,
    RENDER_ERRORS,
    Dialect,
    Renderer,
    Unproven,
    Unrendered,
    as_dict,
    sentinel_messages,
    sentinel_tool,
)

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
    opens: bool = False  # the generation prompt begins a block that the render of a turn does not show
    # Where the last turn is rendered without its end: what is to be put there, without and with tool calls.
    unwritten: str = ""
    unwritten_after_call: str = ""

    @property
    def text(self) -> str:
        return self.marker + self.tail

    def missing(self, message: Message) -> str:
        """The end of the turn as far as the template does not write it behind the last one."""
        return self.unwritten_after_call if message.tool_calls else self.unwritten

    @property
    def markers(self) -> tuple[str, ...]:
        """What ends a turn, with and without tool calls."""
        return tuple(dict.fromkeys(m for m in (self.marker, self.unwritten_after_call) if m))


def find_closing(
    renderer: Renderer, tokens: Collection[str] = (), stops: Collection[str] = (), tools: Sequence[Any] = ()
) -> Closing:
    """Derive the end-of-turn marker from the template: what follows the content of a turn, last or not.

    A turn in the middle is followed by the marker and the next header, the last one by the marker and perhaps
    something that ends the whole conversation; the marker is what both have in common (whole units, so that two
    headers beginning with the same bracket are not cut in the middle). A template with nothing in common, like
    gpt-oss (`<|return|>` at the end, `<|end|>` before), ends a turn with what it writes at the end; one that writes
    nothing there, with the first of the tokenizer's added `tokens` before the next message. One that writes its
    generation prompt behind every conversation has the beginning of two headers in common, too: there the marker
    ends with the first of the `stops`, the tokens that end generation.
    """
    question, answer, next_question = (
        Message(role, f"sentinel{i}x") for i, role in enumerate(("user", "assistant", "user"))
    )
    dialect = renderer.dialect([question, answer], tools=bool(tools))
    dicts = [as_dict(m, dialect) for m in (question, answer, next_question)]
    last = renderer.render(dicts[:2], tools)
    at_end = last.rpartition(answer.content)[2]
    try:
        middle = renderer.raw(dicts, tools)
    except RENDER_ERRORS:  # a template of one exchange
        middle = last
    followed = middle.partition(answer.content)[2]
    marker = _common_units(at_end, followed).rstrip() or at_end.rstrip()
    header, opens = _find_header(renderer, dicts[:1], last, answer, tools)
    if marker and not header.strip() and at_end[len(marker) :].strip():
        marker = _up_to_stop(marker, stops)
    if marker:
        return Closing(marker, at_end[len(marker) :], header, opens)
    unwritten = _begins_next(at_end, followed, tokens)
    if not unwritten:
        raise Unproven(
            "no end-of-turn marker",
            "the template writes nothing after the last assistant turn that would end it, so the model would never "
            "learn to stop; give a template that ends the turn (model.chat_template=chatml|llama3|FILE)",
        )
    return Closing(at_end + unwritten, "", header, opens, unwritten, _after_call(renderer, tokens) or unwritten)


def _up_to_stop(marker: str, stops: Collection[str]) -> str:
    ends = [unit.end() for unit in UNIT.finditer(marker) if unit.group() in stops]
    return marker[: ends[0]] if ends else ""


def _begins_next(last: str, longer: str, tokens: Collection[str]) -> str:
    """The token that begins what a longer conversation goes on with, with the white space before it."""
    following = longer[len(last) :] if longer.startswith(last) else ""
    token = following.lstrip()
    space = following[: len(following) - len(token)]
    found = max((t for t in tokens if token.startswith(t)), key=len, default="")
    return space + found if found else ""


def _after_call(renderer: Renderer, tokens: Collection[str]) -> str:
    """What begins the result of a tool, where the template has tool calls."""
    messages, _ = sentinel_messages(CALLING)
    try:
        dialect = renderer.dialect(messages, tools=True)
        dicts = [as_dict(m, dialect) for m in messages]
        call, result = (renderer.render(dicts[:n], [sentinel_tool()]) for n in (2, 3))
    except Unproven:
        return ""
    return _begins_next(call, result, tokens)


def _find_header(
    renderer: Renderer, question: Sequence[Mapping[str, Any]], whole: str, answer: Message, tools: Sequence[Any]
) -> tuple[str, bool]:
    """What `add_generation_prompt` adds, and whether it opens a block that the turn does not show.

    A template with a header that it does not add would have it trained.
    """
    prompt = renderer.render(question, tools, prompt=True)
    try:
        history = renderer.raw(question, tools)
    except RENDER_ERRORS:
        return "", False
    header = prompt[len(_common_units(prompt, history)) :]
    written = whole[len(prompt) : whole.rindex(answer.content)].strip() if whole.startswith(prompt) else ""
    if not header.strip() and written:
        given = f"add_generation_prompt adds nothing, though an assistant turn begins with {written!r}"
        advice = "the model would be trained to write the header; use a template that adds it to the prompt"
        raise Unproven("template has no generation prompt", f"{given}: {advice}")
    opening = None if whole.startswith(prompt) else find_opening(prompt, whole, common_length(history, prompt))
    return header, opening is not None and opening.is_unseen


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
    """The renders of one conversation (or of the part of it up to one turn).

    `trained`: number of each trained assistant turn -> index of its message.
    """

    def __init__(
        self,
        renderer: Renderer,
        closing: Closing,
        stop_texts: Sequence[str],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        trained: Mapping[int, int],
    ) -> None:
        self.renderer, self.closing, self.stop_texts = renderer, closing, stop_texts
        self.messages, self.tools = messages, tools
        self._header = closing.header.strip()
        self.dialect = self._dialect()
        self.dicts = [as_dict(m, self.dialect) for m in messages]
        self.text = renderer.render(self.dicts, tools)
        self._last: tuple[str, str] | None = None
        for number, index in trained.items():
            if index == len(messages) - 1:
                self._last = self.emitted(index, number, self.dicts, self.text)
                self.text = "".join(self._last)

    def _dialect(self) -> Dialect:
        try:
            return self.renderer.dialect(self.messages, tools=bool(self.tools))
        except Unrendered as problem:
            if problem.field != "reasoning" or not self.closing.opens:
                raise
        # The template never shows reasoning, but serving begins it: it stands in the turn that is emitted.
        return self.renderer.dialect(self.messages, tools=bool(self.tools), without_reasoning=True)

    def emitted(
        self, index: int, number: int, dicts: Sequence[Mapping[str, Any]], rendered: str | None = None
    ) -> tuple[str, str]:
        """What serving sends before the turn at message `index`, and what the model has to emit then, tail included.

        `dicts`: the messages, perhaps with other texts in those before the turn; `rendered`: those up to it, if known.
        """
        prompt = self.renderer.render(dicts[:index], self.tools, prompt=True)
        if rendered is None:
            rendered = self.renderer.render(dicts[: index + 1], self.tools)
        whole = rendered + self.closing.missing(self.messages[index])
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        history = self._history(dicts[:index], prompt)
        opening = find_opening(prompt, whole, history)
        reasoning = (self.messages[index].reasoning or "").strip()
        completion = opening.continuation(whole[opening.at :], reasoning) if opening is not None else None
        if completion is None:
            raise self._wrong_prompt(number, history, prompt, whole)
        return prompt, completion

    def _history(self, dicts: Sequence[Mapping[str, Any]], prompt: str) -> int:
        """How many characters of a prompt are messages: what follows them is the generation prompt."""
        try:
            history = common_length(self.renderer.raw(dicts, self.tools), prompt)
        except RENDER_ERRORS:  # a template that does not end with a user message
            history = len(prompt)
        if history == len(prompt):  # the generation prompt is always there
            content = dicts[-1].get("content") if dicts else None
            _, said, after = prompt.rpartition(content) if isinstance(content, str) and content else ("", "", "")
            history -= len(after) if said else 0
        return history

    def locate(self, index: int, number: int) -> Turn:
        """Find the assistant turn at message `index`; `Unproven` when the text is not what serving will see."""
        is_last = self._last is not None and index == len(self.dicts) - 1
        prompt, completion = self._last if is_last and self._last else self.emitted(index, number, self.dicts)
        header = self._header
        if header and completion[: len(header) + 40].lstrip().startswith(header):
            given = f"serving sends {prompt[-40:]!r} and the turn begins with the header {header!r}"
            raise Unproven(f"generation prompt lacks {header}", f"{given}; the header would be trained", number)
        end = self._end(completion, index, number)
        if end <= 0:
            raise Unproven("empty turn", f"nothing follows the generation prompt {prompt[-40:]!r}", number)
        if not (self.text.startswith(prompt) and self.text.startswith(completion[:end], len(prompt))):
            raise self._rewritten(number, prompt, prompt + completion[:end])
        return Turn(index, number, prompt, completion, end)

    def _end(self, completion: str, index: int, number: int) -> int:
        message = self.messages[index]
        missing = self.closing.missing(message)
        if completion.endswith(missing or self.closing.text):
            return len(completion) - (0 if missing else len(self.closing.tail))
        if message.tool_calls:
            text = completion.rstrip()
            if text.endswith(tuple(self.stop_texts)):
                return len(text)
            given = f"a turn with tool calls ends with {text[-30:]!r}"
            raise Unproven(
                "no end-of-turn marker after a tool call",
                f"{given}, which is neither the template's marker {self.closing.marker!r} nor one of the stop "
                f"tokens {list(self.stop_texts)}; list it as eos_token_id in the model's generation_config.json",
                number,
            )
        given = f"the turn ends with {completion[-30:]!r}, not with {self.closing.text!r}"
        raise Unproven("no end-of-turn marker", given, number)

    def _wrong_prompt(self, number: int, history: int, prompt: str, turn_last: str) -> Unproven:
        """Serving would send something else than what stands before the turn: the header, or the history."""
        at = common_length(prompt, turn_last)
        sent, given = (repr(text[max(0, at - 30) : at + 50]) for text in (prompt, turn_last))
        detail = f"serving sends {sent}, the rendered turn has {given}"
        if at < history:
            construct = construct_at(prompt, at) or construct_at(turn_last, at)
            return Unproven(f"history is rewritten at {construct}", f"{detail}; {USE_INSTEAD}", number)
        advice = "give the turn what the prompt begins, or use a template whose turns repeat its prompt"
        if any(self.messages[i].reasoning for i in range(len(self.messages))):
            advice = f"use data.reasoning=drop, or {advice}"
        added = [unit.group() for unit in UNIT.finditer(prompt, history) if unit.group().strip()]
        return Unproven(f"generation prompt adds {added[-1] if added else sent}", f"{detail}; {advice}", number)

    def _rewritten(self, number: int, prompt: str, emitted: str) -> Unproven:
        """The turn stands in the history in another form than the one that the model has to emit."""
        at = common_length(self.text, emitted)
        construct = construct_at(emitted, at) or construct_at(self.text, at)
        in_history, emitted = (repr(t[max(0, at - 30) : at + 50]) for t in (self.text, emitted))
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
