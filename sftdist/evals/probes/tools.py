"""Calls of tools as models write them into an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sftdist.core.errors import DataError
from sftdist.data.answer_rules import parse_json
from sftdist.data.message import parse_message
from sftdist.data.rowerror import RowError, show
from sftdist.evals.probes.same_json import plain
from sftdist.evals.prompts import Prompt

OPEN, CLOSE = "<tool_call>", "</tool_call>"  # Hermes, Qwen and others
LIST = "[TOOL_CALLS]"  # Mistral
PYTHON = "<|python_tag|>"  # Llama

Calls = list[str]  # name and arguments of each as JSON; in no order, since calls of one turn have none


def calls_in(answer: str) -> Calls | None:
    """The calls in an answer, sorted; None where there is none, or one that cannot be read.

    They stand in `<tool_call>`, behind `[TOOL_CALLS]`, or are the whole answer: an object with name and arguments (or
    parameters), or a list of them.
    """
    found: list[Any] = []
    for text in _texts(answer):
        value, wrong = parse_json(text.strip())
        if wrong is not None:
            return None
        found += value if isinstance(value, list) else [value]
    try:
        return _calls(found) or None
    except RowError:
        return None


def wanted_calls(prompt: Prompt) -> Calls | None:
    """The calls in `checks.tool_calls`, sorted; None where there are none. Raises DataError."""
    wanted = prompt.checks.get("tool_calls")
    if wanted is None:
        return None
    if not wanted:
        raise DataError(f"{prompt.id}: checks.tool_calls: given {show(wanted)}, required at least one call")
    try:
        return _calls(wanted)
    except RowError as problem:
        raise DataError(f"{prompt.id}: {problem}") from None


def _texts(answer: str) -> Iterator[str]:
    if OPEN in answer:
        for part in answer.split(OPEN)[1:]:
            yield part.partition(CLOSE)[0]
    elif LIST in answer:
        yield answer.partition(LIST)[2]
    else:
        yield answer.strip().removeprefix(PYTHON)


def _calls(given: Any) -> Calls:
    """As rows of data say them: with or without `function` around, arguments as an object or as text."""
    calls = [_with_arguments(call) for call in given] if isinstance(given, list) else given
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    parsed = parse_message(message, "checks", "role", "content", None).tool_calls
    return sorted(plain(call["function"]) for call in parsed)


def _with_arguments(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    return {**call, "arguments": call["parameters"]} if "parameters" in call and "arguments" not in call else call
