"""Rendering a conversation with a chat template, exactly as transformers and the serving engines do.

The template is compiled once. The clock is stopped (templates that print today's date would give another store
every day), and how a template wants its input (text or parts, arguments as object or as text) is found by rendering
sentinels, once per structure of a conversation, so a template that drops a field is seen and named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from itertools import chain, product
from typing import Any, NamedTuple, cast

from jinja2 import Template
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from sftdist.data.message import Message

CLOCK = datetime(
    2024, 7, 26
)  # what `strftime_now` says in every render: the day that Llama 3.1's template falls back to
# A template is a program of strangers: what it may raise on a conversation that it does not support.
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
DROPPED_ADVICE = "use a template that renders it, or take the field out of the data"
MAX_STRUCTURES = 4096  # cached ones; data with more different structures is rendered right, only slower


class Shape(NamedTuple):
    """What a message consists of; `name`: it names a speaker, or a tool that no call names."""

    role: str
    content: bool = True
    reasoning: bool = False
    calls: int = 0
    name: bool = False


Structure = tuple[Shape, ...]
PLAIN: Structure = (Shape("user"), Shape("assistant"))
CALLING: Structure = (Shape("user"), Shape("assistant", content=False, calls=1), Shape("tool"), Shape("assistant"))


class Unproven(Exception):
    """Why a conversation, or one turn of it, cannot be supervised; `reason` is the short key that problems share."""

    def __init__(self, reason: str, detail: str, turn: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.turn = reason, detail, turn


class Unrendered(Unproven):
    """A field of the row that the template leaves out: `reasoning`, `tools` or `name`."""

    def __init__(self, field: str, what: str) -> None:
        given = f"{what} is not in the render, in whatever form it is given"
        advice = f"{DROPPED_ADVICE}, or accept it with data.allow_unrendered=[{field}]"
        super().__init__(f"template drops {what}", f"{given}; {advice}")
        self.field, self.what = field, what


class Empty(Enum):
    """How a turn that only calls tools says that it has no content."""

    text = "an empty text"
    absent = "no key"
    null = "null"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a template wants what its authors never agreed on."""

    parts: bool = False  # content as [{"type": "text", "text": ...}], the form of vision models
    arguments_as_text: bool = False  # tool call arguments as a JSON string
    empty: Empty = Empty.text


DIALECTS = (
    *(Dialect(arguments_as_text=as_text, empty=empty) for as_text in (False, True) for empty in Empty),
    *(Dialect(parts=True, empty=empty) for empty in Empty),
)


def as_dict(message: Message, dialect: Dialect) -> dict[str, Any]:
    """The mapping that a template sees; reasoning under both names that templates read (as transformers gives it)."""
    given: dict[str, Any] = {"role": message.role}
    if message.content or not message.tool_calls or dialect.empty is Empty.text:
        given["content"] = [{"type": "text", "text": message.content}] if dialect.parts else message.content
    elif dialect.empty is Empty.null:
        given["content"] = None
    if message.reasoning is not None:
        given["reasoning_content"] = given["thinking"] = message.reasoning
    if message.tool_calls:
        calls = message.tool_calls
        given["tool_calls"] = [_with_text_arguments(c) for c in calls] if dialect.arguments_as_text else list(calls)
    if message.name is not None:
        given["name"] = message.name
    if message.tool_call_id is not None:
        given["tool_call_id"] = message.tool_call_id
    return given


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


class Renderer:
    """A compiled chat template with its constant arguments (special tokens, the user's own); not picklable."""

    def __init__(self, text: str, constants: Mapping[str, Any]) -> None:
        self._template: Template = _compile_jinja_template(text)
        self._template.globals = dict(self._template.globals)  # copied at each render: from a ChainMap that is slow
        self._constants = {"documents": None, **constants, "strftime_now": CLOCK.strftime}
        self._dialects: dict[tuple[Structure, bool, bool, bool], Dialect | Unproven] = {}

    def raw(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, prompt: bool = False) -> str:
        """Render mappings; `prompt` adds the generation prompt. Raises what the template raises (RENDER_ERRORS)."""
        return self._template.render(
            messages=messages, tools=list(tools) or None, add_generation_prompt=prompt, **self._constants
        )

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, prompt: bool = False) -> str:
        """Render mappings; `Unproven` when the template refuses them."""
        try:
            return self.raw(messages, tools, prompt=prompt)
        except RENDER_ERRORS as problem:
            raise Unproven(*refused_by_template(problem)) from problem

    def preview(self, messages: Sequence[Message], tools: Sequence[Any]) -> str:
        """Render for display: fields may be missing, and "" is a refusal."""
        try:
            chosen = self.dialect(messages, tools=bool(tools))
        except Unproven:
            chosen = self._plain_dialect()
        try:
            return self.raw([as_dict(message, chosen) for message in messages], tools)
        except RENDER_ERRORS:
            return ""

    def dialect(
        self, messages: Sequence[Message], *, tools: bool, prompt: bool = False, without_reasoning: bool = False
    ) -> Dialect:
        """The first dialect in which every field of such a conversation reaches the render.

        `Unproven` if there is none: the template refuses the structure, or drops a field in every dialect, which is
        `Unrendered` where the row can do without it. `without_reasoning`: no reasoning need be in the render.
        """
        key = (structure_of(messages), tools, prompt, without_reasoning)
        found = self._dialects.get(key)
        if found is None:
            if len(self._dialects) >= MAX_STRUCTURES:
                self._dialects.clear()
            shapes = tuple(Shape(*shape) for shape in key[0])
            found = self._dialects[key] = self._try_dialects(shapes, tools, prompt, without_reasoning)
        if isinstance(found, Unrendered):
            raise Unrendered(found.field, found.what)
        if isinstance(found, Unproven):
            raise Unproven(found.reason, found.detail)
        return found

    def _try_dialects(
        self, structure: Structure, tools: bool, prompt: bool, without_reasoning: bool
    ) -> Dialect | Unproven:
        _, sentinels = sentinel_messages(structure)
        tool_list = [sentinel_tool()] if tools else []
        if tools:
            sentinels[TOOL_SENTINEL] = LIST_OF_TOOLS
        # Reasoning may be dropped once others have spoken: it has to show where its turn is the last.
        thinking = [i for i, shape in enumerate(structure) if shape.reasoning and not without_reasoning]
        if thinking and thinking[-1] == len(structure) - 1:
            sentinels[reasoning_sentinel(thinking[-1])] = "the reasoning of the last assistant turn"
        elif thinking:
            found = self._try_dialects(structure[: thinking[-1] + 1], tools, False, False)
            if isinstance(found, Unrendered) and found.field == "reasoning":
                return found
        problems: list[tuple[Dialect, Unproven]] = []
        forms = (False, True) if any(shape.calls for shape in structure) else (False,)
        for named, dialect in product(forms, DIALECTS):
            messages, _ = sentinel_messages(structure, name_in_id=named)
            try:
                text = self.raw([as_dict(m, dialect) for m in messages], tool_list, prompt=prompt)
            except RENDER_ERRORS as problem:
                problems.append((dialect, Unproven(*refused_by_template(problem))))
                continue
            missing = next((what for sentinel, what in sentinels.items() if sentinel not in text), None)
            if missing is None:
                return dialect
            problems.append((dialect, _dropped(missing)))
        return self._most_telling(problems, structure)

    def _most_telling(self, problems: Sequence[tuple[Dialect, Unproven]], structure: Structure) -> Unproven:
        """The problem in the form of content that the template takes: a field that the row can do without, else one
        that it drops, else what it says itself, unless that is a plain TypeError."""
        parts = structure != PLAIN and self._plain_dialect().parts
        same_form = [problem for dialect, problem in problems if dialect.parts == parts]
        unrendered = (problem for problem in same_form if isinstance(problem, Unrendered))
        dropped = (problem for problem in same_form if problem.reason.startswith("template drops"))
        told = (problem for problem in same_form if not problem.detail.startswith("TypeError"))
        return next(chain(unrendered, dropped, told), same_form[0])

    def _plain_dialect(self) -> Dialect:
        try:
            return self.dialect(sentinel_messages(PLAIN)[0], tools=False)
        except Unproven:
            return DIALECTS[0]


def refused_by_template(problem: BaseException) -> tuple[str, str]:
    """The reason and the detail of an error that the template raised."""
    name = "" if isinstance(problem, TemplateError) else f"{type(problem).__name__}: "
    said = f"{name}{problem}".strip() or type(problem).__name__
    return f"refused by the template ({said[:80]})", said


def _dropped(what: str) -> Unproven:
    for field, start in (("reasoning", "the reasoning"), ("tools", LIST_OF_TOOLS), ("name", "the name of the speaker")):
        if what.startswith(start):
            return Unrendered(field, what)
    given = f"{what} is not in the render, in whatever form it is given"
    return Unproven(f"template drops {what}", f"{given}; {DROPPED_ADVICE}")


TOOL_SENTINEL = "sentineltool"
LIST_OF_TOOLS = "the list of tools"


def structure_of(messages: Sequence[Message]) -> Structure:
    """What a template's decisions depend on, beside the texts."""
    return tuple(
        # A plain tuple is as good a key as a Shape, at a third of the time.
        cast(Shape, (m.role, m.content != "", m.reasoning is not None, len(m.tool_calls), _is_told(m, messages)))
        for m in messages
    )


def _is_told(message: Message, messages: Sequence[Message]) -> bool:
    """Whether a message has a name that stands nowhere else: not that of a tool that is called."""
    if not message.name:
        return False
    return all(call["function"]["name"] != message.name for m in messages for call in m.tool_calls)


def sentinel_tool() -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"sentinelkey": {"type": "string", "description": "a key"}},
        "required": ["sentinelkey"],
    }
    function = {"name": TOOL_SENTINEL, "description": "a tool", "parameters": parameters}
    return {"type": "function", "function": function}


def sentinel_messages(structure: Structure, *, name_in_id: bool = False) -> tuple[list[Message], dict[str, str]]:
    """Messages of that structure whose every field is a word found nowhere else, and what each word stands for.

    The words of reasoning are not among them: a template may drop it (see `_try_dialects`). Ids of calls have 9
    characters, as some templates require, or hold the name of the function, which others take from there.
    """
    messages, sentinels = [], {}
    called = TOOL_SENTINEL
    for i, shape in enumerate(structure):
        content = f"sentinelcontent{i}x" if shape.content else ""
        if content:
            sentinels[content] = f"the content of {_a(shape.role)} message" + (
                " with tool calls" if shape.calls else ""
            )
        for c in range(shape.calls):
            called = f"sentinelname{i}x{c}x"
            sentinels[called] = "the name of a tool call"
            sentinels[f"sentinelvalue{i}x{c}x"] = "the arguments of a tool call"
        name = f"sentinelspeaker{i}x" if shape.name else None
        if name:
            sentinels[name] = f"the name of the speaker of {_a(shape.role)} message"
        messages.append(
            Message(
                shape.role,
                content,
                reasoning=reasoning_sentinel(i) if shape.reasoning else None,
                tool_calls=tuple(_sentinel_call(i, c, name_in_id) for c in range(shape.calls)),
                name=name or (called if shape.role == "tool" else None),
                tool_call_id="sentinel0" if shape.role == "tool" else None,
            )
        )
    return messages, sentinels


def reasoning_sentinel(i: int) -> str:
    return f"sentinelreasoning{i}x"


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _sentinel_call(i: int, c: int, name_in_id: bool) -> dict[str, Any]:
    function = {"name": f"sentinelname{i}x{c}x", "arguments": {"sentinelkey": f"sentinelvalue{i}x{c}x"}}
    return {
        "id": f"functions.{function['name']}:{c}" if name_in_id else "sentinel0",
        "type": "function",
        "function": function,
    }
