"""Length, loops and ends of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.settings import RowShape
from sftdist.data.message import Message
from sftdist.data.schema import Conversation, parse
from sftdist.evals.probes.behaviour import behaviour_probe, loops
from sftdist.evals.prompts import Answer, Prompt


def scores(answer: str, reference: str | None = None, *, finished: bool = True, **checks: object) -> dict[str, float]:
    prompt = Prompt("s/1", "s", (Message("user", "Hi"),), reference, checks=checks)
    return behaviour_probe().score(prompt, Answer(answer, 1, finished))


def test_an_answer_that_was_cut_off_is_unfinished() -> None:
    assert scores("x", finished=False)["unfinished"] == 1.0
    assert scores("x")["unfinished"] == 0.0


def test_length_beside_the_reference() -> None:
    assert scores("one two three", "a b")["length_ratio"] == 1.5
    assert scores("", "a b")["length_ratio"] == 0.0
    assert scores("\u4f60\u597d\u5417", "\u4f60\u597d")["length_ratio"] == 1.5
    assert "length_ratio" not in scores("x")
    assert "length_ratio" not in scores("x", "!")
    assert "verbose" not in scores("x", "[]", tool_calls=[])


@pytest.mark.parametrize(
    ("words", "reference", "verbose"), [(51, 16, 1.0), (51, 17, 0.0), (50, 1, 0.0), (51, 1, 1.0), (151, 50, 1.0)]
)
def test_verbose_is_more_than_three_times_and_more_than_fifty_words(words: int, reference: int, verbose: float) -> None:
    answer = " ".join(f"w{place}" for place in range(words))
    assert scores(answer, " ".join(["r"] * reference))["verbose"] == verbose


SENTENCE = "Please restart the device and try it again. "


@pytest.mark.parametrize(
    "text",
    [
        "ha " * 20,
        SENTENCE * 4,
        "Well. " + SENTENCE * 4 + "Please",
        "First: it works.\n" + "- the same point here again\n" * 5,
        "\u597d\u7684" * 10,  # no spaces between
        "a" * 60,
        "so" + "!" * 100,
        "so" + "\n" * 100,
        "end |" + "---|" * 30,
        "The CAT the cat " * 8,
    ],
)
def test_a_loop(text: str) -> None:
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ha " * 19,
        SENTENCE * 3,
        "|" + "---|" * 40 + "\n| a | b |",  # a table goes on after its rule
        "=" * 80 + "\nTitle\n" + "=" * 80,
        "| 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
        "\n".join(f"{place}. point {place}" for place in range(40)),
        "no no no, yes yes yes, no no no",
        "x" * 50,
    ],
)
def test_what_merely_repeats_a_little_is_none(text: str) -> None:
    assert not loops(text)


def test_a_loop_far_behind_is_found_and_a_reference_that_repeats_is_followed() -> None:
    varied = " ".join(f"word{place}" for place in range(5_000))
    assert loops(varied + " " + SENTENCE * 10)
    assert not loops(varied)
    assert scores("hello " * 30, "Hello " * 30).keys().isdisjoint({"repetition"})
    assert scores("hello " * 30, "Hello")["repetition"] == 1.0


def test_no_answer_of_the_real_data_is_a_loop_and_every_planted_one_is(shared_data: Path) -> None:
    seen = 0
    for file in sorted(shared_data.glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for number, line in zip(range(150), lines, strict=False):
                row = parse(json.loads(line), RowShape.auto, file=file.name, line=number, id=None)
                texts = (
                    [m.content for m in row.messages if m.role == "assistant"] if isinstance(row, Conversation) else []
                )
                for text in texts:
                    assert not loops(text), text
                    last = " ".join(text.split()[-30:])
                    assert not last or loops(text + f" {last}" * 20), text
                    seen += 1
    assert seen > 300


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text() | st.none())
def test_any_answer_has_scores(answer: str, reference: str | None) -> None:
    found = scores(answer, reference)
    for metric in behaviour_probe().metrics:
        value = found.get(metric.name, 0.0)
        assert value >= 0.0
        assert metric.high is None or value <= metric.high


@pytest.mark.parametrize("piece", ["a", "ab ", "\n", "!", "ab! ", "\u4f60", "\u0301"])
def test_a_huge_answer_is_no_work(piece: str) -> None:
    assert loops(piece * 500_000)
