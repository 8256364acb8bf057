"""The split is a pure function of the prompt: stable, in the asked proportions, the same for equal prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sftdist.core.settings import RowShape
from sftdist.data.clean import Rules, normalise
from sftdist.data.keys import prompt_key
from sftdist.data.schema import Conversation, Message, parse
from sftdist.data.split import split_of


def row(prompt: str, answer: str = "a", system: str | None = None) -> Conversation:
    head = (Message("system", system),) if system else ()
    return Conversation("x", (*head, Message("user", prompt), Message("assistant", answer)))


def test_only_what_precedes_the_first_answer_counts() -> None:
    first = row("How  do I\nreset?", "so")
    longer = Conversation("y", (*row(" How do I reset?").messages, Message("user", "and?"), Message("assistant", "b")))
    assert prompt_key(first) == prompt_key(longer)
    assert prompt_key(first) != prompt_key(row("How do I reset!"))
    assert prompt_key(first) != prompt_key(row("How do I reset?", system="s"))


def parsed(raw: dict[str, Any], **said: Any) -> Conversation:
    found = parse(raw, RowShape.auto, file="f", line=1, id=None, **said)
    assert isinstance(found, Conversation), found
    return found


RULES = [Rules(*on) for on in product((True, False), repeat=4)]
TEXT = st.text(st.sampled_from("aé e\u0301\u0327 \n\r\t\u00a0x\u1100\u1161"), min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None, max_examples=80)
@given(prompt=TEXT, answer=TEXT, gap=st.sampled_from((" ", "  ", "\n", "\r\n", " \t\n ")))
@example(prompt="e \n\u0301", answer="a", gap=" ")
def test_only_the_normalised_prompt_decides(prompt: str, answer: str, gap: str) -> None:
    """Not the answer, the shape of the row, its id and labels, its white space, nor which rules of cleaning are on."""
    text = f"{prompt} b"
    same = [
        parsed({"prompt": text, "completion": answer}),
        parsed({"instruction": text, "output": "other"}),
        parsed({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}], "id": 7}),
        parsed({"prompt": text, "completion": answer, "tags": "x,y", "origin": "m"}, schema_version=1),
        parsed({"prompt": f"{gap}{gap.join(text.split())}{gap}", "completion": answer}),
    ]
    everything = [normalise(row, rules, frozenset({"user"}))[0] for row, rules in product(same, RULES)]
    assert len({prompt_key(row) for row in same + everything}) == 1
    assert prompt_key(same[0]) != prompt_key(parsed({"prompt": f"{prompt} c", "completion": answer}))


def test_which_rows_stand_beside_a_row_does_not_matter() -> None:
    """The split takes one prompt and two fractions: there is nothing else that could move a row."""
    row_of = replace(
        row("How do I reset?"), id="elsewhere", file="other.jsonl", line=99, tags=("x",), label_origin="human"
    )
    assert prompt_key(row_of) == prompt_key(row("How do I reset?"))


def test_fields_cannot_run_into_each_other() -> None:
    assert prompt_key(row("b", system="a")) != prompt_key(row("a b"))


@pytest.mark.parametrize(("validation", "holdout"), [(0.02, 0.02), (0.3, 0.1), (0.0, 0.0), (0.5, 0.5)])
def test_fractions_are_kept(validation: float, holdout: float) -> None:
    n = 20_000
    found = Counter(
        split_of(prompt_key(row(f"question {i}")), validation=validation, holdout=holdout) for i in range(n)
    )
    assert found[1] / n == pytest.approx(validation, abs=0.012)
    assert found[2] / n == pytest.approx(holdout, abs=0.012)


def test_a_larger_validation_share_moves_no_holdout_row() -> None:
    prompts = [prompt_key(row(f"question {i}")) for i in range(2000)]
    small = [split_of(p, validation=0.02, holdout=0.1) for p in prompts]
    large = [split_of(p, validation=0.4, holdout=0.1) for p in prompts]
    assert [s == 2 for s in small] == [s == 2 for s in large]
    assert all(after == 1 for before, after in zip(small, large, strict=True) if before == 1)


def test_the_split_of_a_prompt_never_changes() -> None:
    """A change here would mix held-out prompts of old runs into training: raise SPLIT_VERSION, and know why."""
    assert prompt_key(row("How do I reset my password?")).hex() == "16e9b6149029309e3d00800c47591f3d"
