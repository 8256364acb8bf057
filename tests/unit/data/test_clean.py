"""What each rule of cleaning changes and what none may touch; which conversations count as the same."""

from __future__ import annotations

import time
import unicodedata
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.settings import NormaliseSettings
from sftdist.data.clean import RULES, Rules, normalise
from sftdist.data.keys import content_key
from sftdist.data.schema import Conversation, Message

NONE = Rules(line_ends=False, unicode_nfc=False, trailing_blanks=False, template_trim=False)
ROW = Conversation("a", (Message("user", "caf\u00e9?"), Message("assistant", "yes", reasoning="r")))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"text": " e\u0301 \r\n", "e\u0301": " "}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "e\u0301 \r\n"}}


def with_answer(**fields: object) -> Conversation:
    return replace(ROW, messages=(ROW.messages[0], replace(ROW.messages[1], **fields)))  # type: ignore[arg-type]


def said(text: str, rules: Rules, *trimmed: str) -> tuple[str, tuple[str, ...]]:
    row = Conversation("a", (Message("user", "q"), Message("assistant", text)))
    found, used = normalise(row, rules, frozenset(trimmed))
    return found.messages[1].content, used


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("line_ends", "a\r\nb\rc\r\r\nd\n\re \u2028\x85\x0b\x0cf", "a\nb\nc\n\nd\n\ne \u2028\x85\x0b\x0cf"),
        (
            "unicode_nfc",
            "e\u0301 \u1100\u1161 \ufb01 \u212b",
            "\u00e9 \uac00 \ufb01 \u00c5",
        ),  # the ligature stays: no NFKC
        ("trailing_blanks", " a \t\n\n\t\nb\u00a0\u3000\n  c  d \t", " a\n\n\nb\u00a0\u3000\n  c  d"),
        ("template_trim", "\n\u3000 a  \n\n", "a"),
    ],
)
def test_each_rule_alone(rule: str, before: str, after: str) -> None:
    assert said(before, replace(NONE, **{rule: True}), "assistant") == (after, (rule,))
    assert said(before, replace(Rules(), **{rule: False}), "assistant")[0] != after


def test_rules_are_those_of_the_configuration() -> None:
    """A key of data.normalise without a rule would do nothing."""
    assert vars(NormaliseSettings()) == dict.fromkeys(RULES, True)


def test_names_are_told_only_of_rules_that_changed_something() -> None:
    assert said("caf\u00e9 \u0939\u093f\u0928", Rules()) == ("caf\u00e9 \u0939\u093f\u0928", ())
    assert said("a \r\nb", Rules(), "assistant") == ("a\nb", ("line_ends", "trailing_blanks"))
    assert said("a \r\nb", replace(Rules(), line_ends=False)) == ("a \r\nb", ())
    assert said(" x", Rules(), "user") == (" x", ())  # the template strips another role


def test_every_message_and_reasoning_but_nothing_else() -> None:
    dirty, clean = " e\u0301 \r\n", " \u00e9\n"
    row = Conversation(
        "e\u0301 ",
        (
            Message("system", dirty),
            Message("user", dirty, name="e\u0301 "),
            Message("assistant", dirty, reasoning=dirty, tool_calls=(CALL,)),
            Message("tool", dirty, tool_call_id="e\u0301 "),
            Message("assistant", dirty),
        ),
        tools=(TOOL,),
        tags=("e\u0301 ",),
    )
    found, used = normalise(row, Rules(), frozenset({"system"}))
    assert used == RULES
    assert [m.content for m in found.messages] == ["\u00e9", clean, clean, clean, clean]
    assert found.messages[2].reasoning == clean
    untouched = [replace(m, content="", reasoning=None) for m in row.messages]
    assert [replace(m, content="", reasoning=None) for m in found.messages] == untouched
    assert replace(found, messages=()) == replace(row, messages=())


def test_what_needs_no_change_is_the_same_object() -> None:
    assert normalise(ROW, Rules(), frozenset({"user", "assistant"})) == (ROW, ())
    assert normalise(ROW, Rules())[0] is ROW
    dirty = with_answer(content="yes ")
    assert normalise(dirty, NONE, frozenset({"assistant"}))[0] is dirty
    assert normalise(dirty, Rules())[0].messages[0] is ROW.messages[0]


texts = st.text(st.sampled_from([*"\r\n \t\u00a0\u2000\u2001\u0340\u0301\u0323e\u00e9a\u1100\u1161\u11a8\u3000\ufb01"]))
all_rules = st.sampled_from([Rules(*switches) for switches in product((True, False), repeat=4)])


@settings(deadline=None, max_examples=400)
@given(st.lists(texts, min_size=3, max_size=3), all_rules, st.sampled_from([(), ("user",), ("user", "assistant")]))
def test_a_second_time_changes_nothing(three: list[str], rules: Rules, trimmed: tuple[str, ...]) -> None:
    row = Conversation("a", (Message("user", three[0]), Message("assistant", three[1], reasoning=three[2])))
    once, used = normalise(row, rules, frozenset(trimmed))
    again, more = normalise(once, rules, frozenset(trimmed))
    assert again is once
    assert more == ()
    assert bool(used) == (once != row)
    for before, message in zip(row.messages, once.messages, strict=True):
        for old, new in ((before.content, message.content), (before.reasoning or "", message.reasoning or "")):
            _check_ends(old, new, rules)


def _check_ends(old: str, new: str, rules: Rules) -> None:
    """What the rules promise of a text, and that they only ever change white space and composition."""
    assert not (rules.line_ends and "\r" in new)
    assert not rules.unicode_nfc or unicodedata.is_normalized("NFC", new)
    assert not (rules.trailing_blanks and any(line != line.rstrip(" \t") for line in new.split("\n")))
    assert "".join(unicodedata.normalize("NFC", new).split()) == "".join(unicodedata.normalize("NFC", old).split())


def test_long_runs_of_blanks_take_linear_time() -> None:
    """`[ \\t]+$` looks at each run from each of its places: 200,000 blanks would take minutes."""
    text = (" " * 200_000 + "x ") * 2
    start = time.process_time()
    assert said(text, Rules())[0] == text.rstrip(" ")
    assert time.process_time() - start < 1


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
