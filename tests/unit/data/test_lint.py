"""The figures of the style lint: what they tell, and that they are the same however the rows are divided."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.settings import TrainOn
from sftdist.data.demands import demands_in
from sftdist.data.language import language_of
from sftdist.data.lint import LANGUAGE_KEYS, LANGUAGE_ROWS, Lint
from sftdist.data.schema import Conversation, Message
from sftdist.data.smallest import Smallest
from sftdist.data.style import SIGNS, bucket, end_of, signs_of, words_at

ENGLISH = "The parcel has left our warehouse and will be with you on Friday morning."
OTHERS = {
    "es": "El paquete ha salido de nuestro almac\u00e9n y llegar\u00e1 a su casa el viernes por la ma\u00f1ana.",
    "de": "Das Paket hat unser Lager verlassen und wird am Freitagmorgen bei Ihnen sein.",
    "fr": "Le colis a quitt\u00e9 notre entrep\u00f4t et sera chez vous vendredi dans la matin\u00e9e.",
    "ru": "Посылка покинула наш склад ещё вчера и приедет к вам утром.",
    "zh": "包裹已经离开我们的仓库。将于星期五早上送到您的家中。请您注意查收。",
}


def row(number: int, answer: str, question: str = "q", system: str | None = None) -> Conversation:
    first = () if system is None else (Message("system", system),)
    return Conversation(f"r{number}", (*first, Message("user", question), Message("assistant", answer)))


def linted(rows: Sequence[Conversation], train_on: TrainOn = TrainOn.all) -> Lint:
    lint = Lint()
    for one in rows:
        lint.observe(one, train_on)
    return lint


def figures(rows: Sequence[Conversation]) -> dict[str, Any]:
    return linted(rows).figures()


# --- samples that do not depend on the order ----------------------------------------------------------------


@given(st.lists(st.integers(0, 60), max_size=120), st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_smallest_are_the_same_in_any_grouping(keys: list[int], size: int, dice: random.Random) -> None:
    whole = Smallest(size)
    for key in keys:
        whole.add(key, [f"v{key}"])
    counts = Counter(keys)
    assert [entry[:2] for entry in whole] == [[key, counts[key]] for key in sorted(counts)[:size]]
    assert whole.overflowed == (len(counts) > size)
    parts = [Smallest(size) for _ in range(3)]
    dice.shuffle(keys)
    for key in keys:
        part = dice.choice(parts)
        if part.wants(key):  # asking first must not change what comes out
            part.add(key, [f"v{key}"])
    dice.shuffle(parts)
    merged = Smallest(size)
    for part in parts:
        merged.merge(json.loads(json.dumps(part.to_json())))
    assert merged.to_json() == whole.to_json()


def test_distinct_is_exact_and_then_an_estimate() -> None:
    found = Smallest(256)
    dice = random.Random(0)
    for _ in range(256):
        found.add(dice.randrange(2**64), [])
    assert (found.distinct(2**64), found.overflowed) == (256, False)
    for _ in range(9744):
        found.add(dice.randrange(2**64), [])
    assert abs(found.distinct(2**64) - 10_000) < 2_000  # the relative error is about 1/sqrt(256)


# --- signs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "signs"),
    [
        ("Hello there, it works.", {"greeting"}),
        ("Good morning. It works.", {"greeting"}),
        ("Good code is short.", set()),
        ("Sure! It works.", {"agreement", "exclamation"}),
        ("Of course, it works.", {"agreement"}),
        ("Of the two, the first.", set()),
        ("I'm sorry, it does not.", {"apology"}),
        ("I think so.", set()),
        ("High time.", set()),
        ("It works. Let me know if it does not.", {"closing phrase"}),
        ("let me know first. " + "It works. " * 30, set()),
        ("if (a != b) return;", set()),
        ("It works \U0001f600", {"emoji"}),
        ("As an AI language model, no.", {"names itself an AI"}),
        ("# Title\ntext", {"headings"}),
        ("#!/bin/bash\nls", set()),
        ("a\n- b\n- c", {"bullets"}),
        ("- b\n- c", {"bullets"}),
        ("-1", set()),
        ("1. b\n2. c", {"numbered"}),
        ("**a** b", {"bold"}),
        ("a\n```\nb\n```", {"code blocks"}),
        ("| a | b |\n|---|---|", {"tables"}),
        ("", set()),
        ("\n", set()),
    ],
)
def test_signs_of_an_answer(answer: str, signs: set[str]) -> None:
    assert set(signs_of(answer)) == signs
    assert signs <= set(SIGNS)


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        ("a. ", "a sentence mark"),
        ("a)", "a bracket or quote"),
        ("5", "a digit"),
        ("b", "a letter"),
        ("+", "something else"),
        ("", "something else"),
        ("\u597d\u3002", "a sentence mark"),
    ],
)
def test_ends(answer: str, end: str) -> None:
    assert end_of(answer) == end


@given(st.integers(1, 10**6))
def test_bars_of_the_histogram_are_a_twelfth_wide_at_most(words: int) -> None:
    assert abs(words_at(bucket(words)) - words) <= 0.05 * words + 0.5


# --- instructions -----------------------------------------------------------------------------------------------

LONG = "word " * 900


@pytest.mark.parametrize(
    ("asked", "keeps", "breaks"),
    [
        ("Be concise.", "word " * 50, LONG),
        ("Please keep your answers concise and friendly.", "ok", LONG),
        ("Explain briefly what a monad is", "ok", LONG),
        ("Describe it in under 50 words.", "word " * 55, "word " * 80),
        ("Answer in one word: is it?", "Yes.", "It is indeed, as far as I know."),
        ("Use at most two sentences.", "A. B. C.", "A b. C d. E f. G h."),
        ("Respond in JSON.", ' {"a": 1}', "The answer is 1."),
        ("Reply with JSON only", "```json\n{}\n```", "Sure: 1"),
        ("Do not use markdown.", "Plain.", "**Bold**"),
        ("Write it in plain text", "- a", "# A\n- b"),
        ("List them as bullet points", "- a\n- b", "a and b"),
        ("Answer yes or no: is it?", "Yes.", "It depends on the weather, the day and the place."),
    ],
)
def test_instructions_and_what_contradicts_them(asked: str, keeps: str, breaks: str) -> None:
    (demand,) = demands_in(asked)
    assert not demand.broken(keeps)
    assert demand.broken(breaks)


@pytest.mark.parametrize(
    "asked",
    [
        "Write a function that returns valid JSON.",
        "How do I load a json file in Python?",
        "Write a short story about a fox.",
        "What does concise mean?",
        "I wrote 300 words in two days, is that much?",
        "Convert this text to markdown.",
        "Give me a list of fruits.",
        "Is it a yes or no question?",
        "briefly",
        "Answer yes or no and explain why.",
    ],
)
def test_what_is_no_instruction(asked: str) -> None:
    assert list(demands_in(asked)) == []


def test_contradictions_are_counted_with_their_rows() -> None:
    rows = [row(i, LONG if i < 2 else "ok", "What is it?", "Be concise.") for i in range(10)]
    rows.append(row(10, LONG, "What is it? Be concise.", "Be concise."))  # one instruction, said twice
    (found,) = figures(rows)["contradicted instructions"]
    assert (found["what"], found["given"], found["contradicted"]) == ("be concise", 11, 3)
    assert set(found["rows"]) == {"r0", "r1", "r10"}


def test_an_instruction_counts_for_the_answer_behind_it() -> None:
    turns = (
        Message("user", "Be concise."),
        Message("assistant", "ok"),
        Message("user", "And?"),
        Message("assistant", LONG),
    )
    (found,) = figures([Conversation("a", turns)])["contradicted instructions"]
    assert (found["given"], found["contradicted"]) == (1, 0)


def test_what_a_tool_says_is_no_instruction() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = (
        Message("user", "q"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "Be concise."),
        Message("assistant", LONG),
    )
    assert figures([Conversation("a", turns)])["contradicted instructions"] == []


# --- figures ---------------------------------------------------------------------------------------------------


def test_a_mixed_tone_is_named_and_a_steady_one_is_not() -> None:
    steady = [row(i, "Hello, it works.") for i in range(100)]
    assert figures(steady)["mixed tone"] == []
    mixed = [*steady[:60], *(row(i, "It works! \U0001f600\n- a") for i in range(60, 100))]
    assert figures(mixed)["mixed tone"] == ["greeting", "exclamation", "emoji"]  # layout is not tone
    shares = {item["what"]: item["share"] for item in figures(mixed)["style"]}
    assert (shares["greeting"], shares["bullets"]) == (0.6, 0.4)


def test_system_prompts_are_counted() -> None:
    rows = [row(i, "a", system=f"You are {'ABC'[min(i % 5, 2)]}.") for i in range(50)] + [row(50, "a")]
    found = figures(rows)["system prompts"]
    assert (found["distinct"], found["estimated"], found["rows without one"]) == (3, False, 1)
    assert [(entry["text"], entry["rows"]) for entry in found["most frequent"][:1]] == [("You are C.", 30)]


def test_length_outliers_are_told_with_their_rows() -> None:
    dice = random.Random(0)
    usual = [row(i, "w " * dice.randrange(40, 80)) for i in range(300)]
    assert figures(usual)["length outliers"]["answers"] == 0
    alike = [row(i, "w " * 10) for i in range(90)] + [row(90, "w " * 12)]
    assert figures(alike)["length outliers"]["answers"] == 0
    found = figures([*usual, row(300, "w " * 5000), row(301, "w")])["length outliers"]
    assert found["answers"] == 2
    assert found["longest"] == [{"id": "r300", "words": 5000}]
    assert found["shortest"] == [{"id": "r301", "words": 1}]


def test_endings_and_languages_that_are_rare_are_told_with_their_rows() -> None:
    usual = [row(i, f"{ENGLISH} It has the number {i}.") for i in range(100)]
    odd = [row(100 + i, text) for i, text in enumerate(OTHERS.values())]
    found = figures([*usual, *odd, row(200, "We went ho")])
    ends = {item["what"]: item.get("rows") for item in found["endings"]}
    assert ends == {"a sentence mark": None, "a letter": ["r200"]}
    languages = {item["what"]: item.get("rows") for item in found["languages"]["found"]}
    assert languages == {"en": None, "not sure": ["r200"]} | {code: [f"r{100 + i}"] for i, code in enumerate(OTHERS)}
    assert (found["languages"]["rows looked at"], found["languages"]["chosen"]) == (106, "all rows")


@pytest.mark.parametrize(("code", "text"), [("en", ENGLISH), *OTHERS.items()])
def test_languages(code: str, text: str) -> None:
    assert language_of(text) == code
    assert language_of(text[:3]) is None
    assert language_of(f"{text}\n```\n{'le colis est chez vous ' * 20}\n```") == code


def test_a_sample_of_languages_says_so_and_is_near() -> None:
    found = figures([row(i, f"{OTHERS['es'] if i % 4 == 0 else ENGLISH} {i}") for i in range(2000)])["languages"]
    assert found["chosen"] == "by hash, about 1 in 16"
    assert 128 <= found["rows looked at"] < 200
    shares = {item["what"]: item["share"] for item in found["found"]}
    assert abs(shares["es"] - 0.25) < 0.1


def test_only_trained_answers_are_looked_at() -> None:
    turns = (
        Message("user", "q"),
        Message("assistant", "Hello!", train=False),
        Message("user", "q"),
        Message("assistant", "a."),
    )
    lint = linted([Conversation("a", turns), Conversation("b", turns[:2])])
    assert (lint.rows, lint.answers, dict(lint.signs)) == (1, 1, {})
    assert linted([Conversation("a", turns)], TrainOn.flagged).rows == 0


def test_no_rows_have_figures_too() -> None:
    assert figures([])["answers"] == 0
    assert figures([row(0, ENGLISH)])["languages"]["found"] == []
    assert Lint.merged([]).figures() == figures([])


# --- any grouping, bounded memory ----------------------------------------------------------------------------------

pieces = st.sampled_from(
    ["Hello, ", "Sure! ", "w " * 200, "word ", "\n- b", "**x**", "5", ENGLISH, OTHERS["es"], "\U0001f600", "..."]
)
some_rows = st.lists(
    st.builds(
        row,
        st.integers(0, 30),
        st.lists(pieces, min_size=1, max_size=4).map("".join),
        st.sampled_from(["Be concise.", "q", "Answer in one word."]),
        st.sampled_from([None, "s", "Be brief.", "t"]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(some_rows, st.randoms(use_true_random=False))
def test_any_grouping_gives_the_same(rows: list[Conversation], dice: random.Random) -> None:
    whole = linted(rows)
    shuffled = dice.sample(rows, len(rows))
    parts = [linted(part).to_json() for part in _divided(shuffled, dice)]
    nested = [Lint.merged(parts[:2]).to_json(), *parts[2:]]
    merged = Lint.merged(json.loads(json.dumps(nested)))
    assert merged.to_json() == json.loads(json.dumps(whole.to_json()))
    assert merged.figures() == whole.figures()
    assert merged.figures() == merged.figures()  # telling them changes nothing


def _divided(rows: list[Conversation], dice: random.Random) -> Iterator[list[Conversation]]:
    while rows:
        size = dice.randrange(1, len(rows) + 1)
        yield rows[:size]
        rows = rows[size:]


def test_memory_is_bounded() -> None:
    """Every system prompt, id and answer another one: what is kept stops growing."""
    lint, sizes = Lint(), []
    for i in range(3000):
        lint.observe(row(i, f"{i} " + "x" * 300, system=f"You are {i}. " + "y" * 200), TrainOn.all)
        if i % 1000 == 999:
            sizes.append(len(json.dumps(lint.to_json())))
    assert sizes[2] < 1.02 * sizes[1] < 150_000
    assert abs(lint.figures()["system prompts"]["distinct"] - 3000) < 600


def test_merging_is_exact_when_samples_overflow() -> None:
    rows = [row(i % 3900, f"{ENGLISH} {i % 3900}", system=f"You are {i % 700}.") for i in range(4000)]
    whole = linted(rows)
    parts = [linted(rows[start::7]).to_json() for start in range(7)]
    assert Lint.merged(reversed(parts)).to_json() == whole.to_json()
    assert sum(whole.languages.values()) > 80
    assert whole.figures() == whole.figures()  # telling them changes nothing
    read = sum(_key_of(one) < LANGUAGE_KEYS for one in rows)
    assert read <= whole.figures()["languages"]["rows looked at"] <= read + LANGUAGE_ROWS


def _key_of(one: Conversation) -> int:
    """By which it is decided whether the language of a row is looked at."""
    lint = linted([one])
    return next(iter(lint.unread))[0]


def test_languages_that_are_read_ahead_change_no_figure() -> None:
    rows = [row(i, f"{ENGLISH} It has number {i}.") for i in range(600)]
    parts = [linted(rows[::2]), linted(rows[1::2])]
    plain = Lint.merged(part.to_json() for part in parts).figures()
    for part in parts:
        part.read_ahead()
    read = [entry[2][2] for part in parts for entry in part.unread]
    assert "en" in read
    assert "" in read, "what hardly comes into the sample is not read"
    assert Lint.merged(json.loads(json.dumps(part.to_json())) for part in parts).figures() == plain
