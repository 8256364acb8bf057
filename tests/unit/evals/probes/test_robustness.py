"""Prompts in other words: the same for the same seed, and nothing touched that decides the answer."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.errors import ConfigError
from sftdist.data.message import Message
from sftdist.evals.probes.robustness import KINDS, fall, variants
from sftdist.evals.prompts import Prompt

ALL = list(KINDS)
SHOP = (
    "Please tell me the price of 3 lamps and twelve chairs in Lisbon, but not the tables. Natalia wrote to "
    'ann@web.de about "the blue one" on 2024-05-17.\n```python\ndef price(lamp):\n    return lamp * two_prices\n```\n'
    "Natalia prefers, as Natalia does, the answer as JSON with the key unit_price, `total` and nothing else. "
    "What is the whole sum?"
)


def prompt(text: str, id: str = "a/1", system: str | None = None, **more: Any) -> Prompt:
    head = (Message("system", system),) if system else ()
    return Prompt(id, "a", (*head, Message("user", text)), **more)


def reworded(text: str, kind: str, **more: Any) -> str:
    found = variants([prompt(text, **more)], [kind], 0)
    return found[0].question if found else text


def test_ids_and_where_they_come_from() -> None:
    found = variants([prompt("What is the whole sum?", system="Be brief.", reference="12")], ALL, 0)
    assert [(one.id, one.variant_of, one.variant) for one in found] == [(f"a/1~{k}", "a/1", k) for k in ALL]
    assert {one.source for one in found} == {"a"}
    assert {one.reference for one in found} == {"12"}


def test_the_same_seed_gives_the_same_whatever_else_is_asked() -> None:
    prompts = [prompt(SHOP, id=f"a/{place}") for place in range(8)]
    found = variants(prompts, ALL, 7)
    assert variants(prompts[::-1], ALL[::-1], 7) == found[::-1]
    assert variants(prompts[3:4], ["typos"], 7) == [one for one in found if one.id == "a/3~typos"]
    assert {one.question for one in variants(prompts, ["typos"], 8)} != {one.question for one in found[:8]}


@pytest.mark.parametrize("kind", ["typos", "case", "paraphrase"])
def test_what_decides_the_answer_stays(kind: str) -> None:
    for seed in range(30):
        (found,) = variants([prompt(SHOP, reference="The whole price is 40.")], [kind], seed)
        text = found.question
        assert text != SHOP
        kept = ["3", "twelve", "not", "Lisbon", "ann@web.de", '"the blue one"', "2024-05-17.", "JSON", "unit_price"]
        kept += ["`total`", "```python\ndef price(lamp):\n    return lamp * two_prices\n```", "nothing", "but"]
        kept += ["whole", "price of"] if kind != "case" else []  # words of the reference
        assert [part for part in kept if part not in text] == []
        assert text.count("Natalia") == 3  # also at the begin of a sentence


def test_typos_are_slips_in_some_long_words() -> None:
    text = "We would like several wooden shelves near every window because people keep stacking things there."
    for seed in range(30):
        (found,) = variants([prompt(text)], ["typos"], seed)
        changed = [(a, b) for a, b in zip(text.split(), found.question.split(), strict=True) if a != b]
        assert 1 <= len(changed) <= 2
        for before, after in changed:
            assert len(before) >= 4
            assert after[0] == before[0]
            assert abs(len(after) - len(before)) <= 1
            assert sum((Counter(before) - Counter(after)).values()) <= 1


def test_case_is_small_or_large_throughout() -> None:
    text = "Where does Anna live? Tell me the street."
    found = {variants([prompt(text)], ["case"], seed)[0].question for seed in range(20)}
    assert found == {"where does Anna live? tell me the street.", "WHERE DOES Anna LIVE? TELL ME THE STREET."}
    # Small letters would change nothing here.
    assert reworded("how are you", "case") == "HOW ARE YOU"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the capital of Peru?", "Could you tell me what is the capital of Peru?"),
        ("how many moons has Mars?", "what number of moons has Mars?"),
        ("Please, count to five.", "Count to five."),
        ("It rains. Can you close the roof?", "It rains. Could you close the roof?"),
        ("Wie viele Monde hat der Mars?", "Eine Frage: wie viele Monde hat der Mars?"),
        ("Somewhat is left. The list of finds.", "Somewhat is left. The list of finds."),  # not at the begin of a word
        ('"What is love" is a song.', '"What is love" is a song.'),
        ("`write` or `list`", "`write` or `list`"),
    ],
)
def test_paraphrases_of_what_is_known(text: str, expected: str) -> None:
    assert reworded(text, "paraphrase", system="Answer.") == expected


def test_where_no_saying_is_known_a_line_is_said_before() -> None:
    text = "Which of the seven dwarfs wears no beard in the old animated film about the princess?"
    line, _, rest = reworded(text, "paraphrase").partition("\n\n")
    assert rest == text
    assert line.endswith((".", "?"))
    german = "Welcher der sieben Zwerge trägt im alten Zeichentrickfilm über die Prinzessin keinen Bart?"
    assert re.match("Ich|Kannst|Hier", reworded(german, "paraphrase"))
    # Under a system message the text may be material; an instruction may be about the prompt itself.
    assert reworded(text, "paraphrase", system="Translate into German.") == text
    assert reworded(text, "paraphrase", checks={"instructions": [{"kind": "repeats", "value": text}]}) == text
    assert reworded("xqzt vbnm wrtp", "paraphrase") == "xqzt vbnm wrtp"


def test_without_the_system_message() -> None:
    turns = (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Well?"))
    talk = Prompt("a/1", "a", (Message("system", "Be kind."), *turns))
    (found,) = variants([talk], ["no_system"], 0)
    assert found.messages == turns
    assert variants([found], ["no_system"], 0) == []


def test_only_the_last_user_message_changes() -> None:
    turns = (Message("user", SHOP), Message("assistant", SHOP), Message("user", SHOP))
    for found in variants([Prompt("a/1", "a", turns)], ["typos", "case", "paraphrase"], 0):
        assert found.messages[:2] == turns[:2]
        assert found.messages[2] != turns[2]


def test_a_prompt_that_cannot_change_is_left_out() -> None:
    assert (
        variants(
            [prompt("12 + 30 = ?"), prompt("is it Lisbon?", id="a/2", reference="It is."), prompt("`x`", id="a/3")],
            ALL,
            0,
        )
        == []
    )
    assert variants([Prompt("a/4", "a", (Message("system", "Speak."), Message("assistant", "Hm")))], ["typos"], 0) == []


def test_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"given typo, required some of typos, case, paraphrase, no_system"):
        variants([], ["typos", "typo"], 0)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.integers(0, 5))
def test_any_text_is_taken_and_numbers_never_change(text: str, seed: int) -> None:
    for found in variants([prompt(text or " ")], ["typos", "case", "paraphrase"], seed):
        assert re.findall(r"\d+", found.question) == re.findall(r"\d+", text)


@pytest.mark.parametrize(
    ("original", "variant", "moved"),
    [
        ({"token_f1": 0.8, "pii_free": 1.0}, {"token_f1": 0.5, "pii_free": 0.0}, -0.3),
        ({"token_f1": 0.8, "numeric_match": 1.0}, {"token_f1": 0.9, "numeric_match": 0.0}, -1.0),
        ({"over_refusal": 0.0}, {"over_refusal": 1.0}, -1.0),
        ({"refusal": 0.0}, {"refusal": 1.0}, 1.0),
        ({"numeric_match": 1.0, "rouge_l": 0.5}, {"rouge_l": 0.5}, 0.0),
        ({"pii_free": 1.0}, {"pii_free": 0.0}, None),
        ({}, {"token_f1": 1.0}, None),
    ],
)
def test_the_fall_is_of_the_main_metric_that_both_have(
    original: dict[str, float], variant: dict[str, float], moved: float | None
) -> None:
    found = fall(original, variant)
    assert (found is None) if moved is None else found == pytest.approx(moved)
