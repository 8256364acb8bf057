"""What cleaning changes (line ends) and which conversations count as the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sftdist.data.clean import normalise
from sftdist.data.keys import content_key
from sftdist.data.schema import Conversation, Message

ROW = Conversation("a", (Message("user", "caf\u00e9?"), Message("assistant", "yes", reasoning="r")))


def with_answer(**fields: object) -> Conversation:
    return replace(ROW, messages=(ROW.messages[0], replace(ROW.messages[1], **fields)))  # type: ignore[arg-type]


def test_only_line_ends_change() -> None:
    row = Conversation("a", (Message("user", "a\r\nb\rc \u2028\td\n"), Message("assistant", " x ", reasoning="m\r\n")))
    assert [m.content for m in normalise(row).messages] == ["a\nb\nc \u2028\td\n", " x "]
    assert normalise(row).messages[1].reasoning == "m\n"
    assert normalise(ROW) is ROW


def test_provenance_and_composition_do_not_tell_rows_apart() -> None:
    decomposed = replace(ROW, messages=(Message("user", " cafe\u0301?\n"), ROW.messages[1]))
    assert content_key(decomposed) == content_key(ROW)
    assert content_key(replace(ROW, id="b", file="x", line=3, tags=("t",))) == content_key(ROW)


@pytest.mark.parametrize(
    "other",
    [
        with_answer(content="Yes"),
        with_answer(content="y es"),
        with_answer(reasoning=None),
        with_answer(weight=0.5),
        with_answer(train=False),
        with_answer(tool_calls=({"function": {"name": "f", "arguments": {}}},)),
        replace(ROW, tools=({"name": "f"},)),
        replace(ROW, messages=(Message("system", "s"), *ROW.messages)),
        Conversation("a", (Message("user", "caf\u00e9?yes"), Message("assistant", "", reasoning="r"))),
    ],
)
def test_whatever_changes_training_makes_another_row(other: Conversation) -> None:
    assert content_key(other) != content_key(ROW)
