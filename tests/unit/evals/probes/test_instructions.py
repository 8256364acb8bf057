"""Verifiable instructions: each kind by an answer that follows and one that does not, and beside IFEval's own code."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sftdist.core.errors import DataError
from sftdist.data import answer_rules
from sftdist.data.message import Message
from sftdist.evals.probes.behaviour import behaviour_probe
from sftdist.evals.probes.instruction_kinds import KINDS
from sftdist.evals.probes.instructions import variants
from sftdist.evals.prompts import Answer, Prompt

ENGLISH = "your parcel has left the warehouse and will be with you on Friday"
GERMAN = "Ihr Paket hat das Lager verlassen und wird am Freitag bei Ihnen sein"


def asked(*instructions: dict[str, Any]) -> Prompt:
    return Prompt("s/1", "s", (Message("user", "Hi"),), checks={"instructions": list(instructions)})


def scores(answer: str, *instructions: dict[str, Any]) -> tuple[float, float]:
    """Strict and loose."""
    found = behaviour_probe().score(asked(*instructions), Answer(answer, 1, True))
    return found["instructions_strict"], found["instructions_loose"]


# An instruction, an answer that follows it, and one that does not, not even loosely.
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "min_words", "value": 3}, "one two three", "one two"),
    ({"kind": "max_words", "value": 2}, "one two", "one two three"),
    ({"kind": "min_sentences", "value": 2}, "One. Two!", "One, two."),
    ({"kind": "max_sentences", "value": 1}, "It is 3.5 km.", "One. Two."),
    ({"kind": "min_paragraphs", "value": 2}, "a\n\nb", "a\nb"),
    ({"kind": "max_paragraphs", "value": 1}, "a\nb", "a\n\nb\n\nc\n\nd"),
    ({"kind": "min_characters", "value": 3}, "abc", "ab"),
    ({"kind": "max_characters", "value": 3}, "abc", "abcd"),
    ({"kind": "language", "value": "de"}, GERMAN, ENGLISH),
    ({"kind": "json_only"}, '{"a": [1]}', 'Sure: {"a": [1]}'),
    ({"kind": "required", "value": r"#\d+"}, "ticket #12", "ticket 12"),
    ({"kind": "forbidden", "value": ["!", "sorry"]}, "No.", "I am sorry"),
    ({"kind": "starts_with", "value": "Dear"}, "Dear Ana", "Hello Ana"),
    ({"kind": "ends_with", "value": "Bye"}, "So long. Bye", "Bye, so long"),
    ({"kind": "one_of", "value": ["yes", "no"]}, "yes", "yes and no"),
    ({"kind": "bullets", "at_least": 2, "at_most": 2}, "- a\n* b", "- a\n- b\n- c\n- d\n- e"),
    ({"kind": "bullets", "at_least": 1}, "  + a", "-5 degrees\n---"),
    ({"kind": "placeholders", "at_least": 2}, "[name] of [street]", "[name] of []"),
    ({"kind": "highlights", "at_least": 2}, "*one* and **two**", "*one* and ** **"),
    ({"kind": "capital_words", "at_least": 2}, "A WELL-KNOWN fact", "One WELL-KNOWN fact"),
    ({"kind": "capital_words", "at_most": 0}, "One fact", "One FACT, TWO"),
    ({"kind": "word_count", "word": "lamp", "at_least": 2}, "Lamp, lamp!", "a lamp, lamps"),
    ({"kind": "word_count", "word": "lamp", "at_most": 1}, "a lamp, lamps", "lamp lamp\nlamp lamp\nlamp lamp"),
    ({"kind": "letter_count", "letter": "E", "at_least": 3}, "Eleven", "seven"),
    ({"kind": "sections", "marker": "PART", "at_least": 2}, "PART 1\na\n**PART 2**\nb", "PART 1\na\nin PART 2"),
    ({"kind": "includes", "value": ["blue lamp", "red"]}, "Red, a Blue Lamp", "a blue lamp, reddish"),
    ({"kind": "includes", "value": "\u4f60\u597d"}, "\u8bf4\u4f60\u597d\u554a", "\u4f60\u5f88\u597d"),
    ({"kind": "excludes", "value": ["cat"]}, "concatenate", "a CAT"),
    ({"kind": "first_word", "word": "Then"}, '"then," he said', "And then"),
    ({"kind": "first_word", "word": "b", "paragraph": 2}, "a\n \nB, c", "b\n\na"),
    ({"kind": "repeats", "value": "Who is it?"}, "who is it? Ana.", "Ana. Who is it?"),
    ({"kind": "postscript"}, "Bye.\nP. S. Call me", "Bye.\nP.S."),
    ({"kind": "postscript", "marker": "PS:"}, "Bye.\n*PS: call*", "Bye. PS: call"),
    ({"kind": "parts", "exactly": 2}, "a\n***\nb\n***", "a\n******\nb"),
    ({"kind": "parts", "exactly": 2, "divider": "======", "different": True}, "a\n======\nb", "a\n======\na\n======"),
    ({"kind": "no_commas"}, "a and b", "a, b"),
    ({"kind": "no_commas"}, "a and b", "\u4f60\uff0c\u597d"),
    ({"kind": "upper_case"}, "ALL OF IT: 1", "ALL of IT"),
    ({"kind": "lower_case"}, "all of it: 1", "all Of it"),
    ({"kind": "title"}, "<<My day>>\nIt rained.", "<< >>\n<My day>"),
    ({"kind": "quoted"}, '"It rained."', 'It "rained"'),
]


@pytest.mark.parametrize(("instruction", "good", "bad"), CASES)
def test_each_kind_tells_what_follows(instruction: dict[str, Any], good: str, bad: str) -> None:
    assert scores(good, instruction) == (1.0, 1.0)
    assert scores(f"\n {good}\n", instruction)[1] == 1.0  # white space around is nothing, loosely at least
    assert scores(bad, instruction) == (0.0, 0.0)
    assert behaviour_probe().explain(asked(instruction), Answer(good, 1, True)) == []
    assert len(behaviour_probe().explain(asked(instruction), Answer(bad, 1, True))) >= 1


def test_every_kind_has_a_case() -> None:
    assert {case["kind"] for case, _, _ in CASES} == set(KINDS)
    assert len(KINDS) >= 14


def test_an_empty_answer_follows_nothing() -> None:
    assert scores("", {"kind": "no_commas"}) == (0.0, 0.0)
    assert scores(" \n", {"kind": "max_words", "value": 5}) == (0.0, 0.0)


def test_a_prompt_is_right_where_every_instruction_is_followed() -> None:
    both = ({"kind": "no_commas"}, {"kind": "max_words", "value": 2})
    assert scores("a b", *both) == (1.0, 1.0)
    assert scores("a, b", *both) == (0.0, 0.0)
    said = behaviour_probe().explain(asked(*both), Answer("a, b c", 1, True))
    assert said == ['no_commas: given "a, b c", required no comma', "max_words: given 3 words, required at most 2"]


def test_loosely_an_introduction_a_farewell_and_asterisks_are_forgiven() -> None:
    assert scores("Sure!\nalpha", {"kind": "lower_case"}) == (0.0, 1.0)
    assert scores("alpha\nBye!", {"kind": "lower_case"}) == (0.0, 1.0)
    assert scores("Sure!\nalpha\nBye!", {"kind": "lower_case"}) == (0.0, 1.0)
    assert scores("**yes**", {"kind": "one_of", "value": "yes"}) == (0.0, 1.0)
    assert scores('```json\n{"a": 1}\n```', {"kind": "json_only"}) == (0.0, 1.0)
    assert scores("a\nSure!\nb", {"kind": "lower_case"}) == (0.0, 0.0)
    assert len(variants("*a*\nb\n*c*\n*d*")) == 8


# --- what cannot be carried out is said before anybody is asked ----------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ({"kind": "max_word", "value": 1}, "[0].kind: max_word: unknown key; did you mean max_words?"),
        ({"kind": "regex", "value": "a"}, "[0].kind: regex: unknown key; did you mean required?"),
        ({"value": 1}, '[0]: given {"value": 1}, required an object with kind'),
        ({"kind": "max_words"}, "[0]: max_words: missing a required argument: 'value'; it takes value"),
        ({"kind": "max_words", "value": 1, "least": 2}, "got an unexpected keyword argument 'least'; it takes value"),
        ({"kind": "title", "value": 1}, "it takes nothing"),
        ({"kind": "max_words", "value": "5"}, '[0]: max_words: given "5", required a whole number'),
        ({"kind": "bullets"}, "bullets: given no bound, required at_least, at_most or both"),
        ({"kind": "bullets", "at_least": True}, "bullets.at_least: given true, required a whole number"),
        ({"kind": "bullets", "at_least": 3, "at_most": 2}, "bullets.at_least: given 3, required at most the 2"),
        (
            {"kind": "letter_count", "letter": "ab", "at_least": 1},
            'letter_count.letter: given "ab", required one letter',
        ),
        ({"kind": "includes", "value": []}, "includes: given an empty list"),
        ({"kind": "first_word", "word": "a", "paragraph": 0}, "first_word.paragraph: given 0"),
        ({"kind": "parts", "exactly": 2, "different": 1}, "parts.different: given 1, required true or false"),
        ({"kind": "required", "value": "("}, 'required: given "(", required a regular expression'),
        ({"kind": "language", "value": "english"}, 'language: given "english", required the ISO 639 code'),
    ],
)
def test_an_instruction_that_there_is_not(instruction: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        behaviour_probe().check(asked(instruction))


@pytest.mark.parametrize("value", [[], "no_commas", {"kind": "no_commas"}, None])
def test_instructions_are_a_list(value: object) -> None:
    prompt = Prompt("s/1", "s", (Message("user", "Hi"),), checks={"instructions": value})
    with pytest.raises(DataError, match=r"s/1: checks\.instructions: given .*, required a list such as"):
        behaviour_probe().check(prompt)


# --- hostile answers ------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(), max_size=200) | st.text(st.sampled_from('*[]<>#-\n "{}|.,aA1'), max_size=200))
@example("\ud800")
@example("[" * 5_000)
@example("\x00\n\x85\u2028")
def test_any_answer_has_scores(answer: str) -> None:
    for instruction, _, _ in CASES:
        strict, loose = scores(answer, instruction)
        assert 0.0 <= strict <= loose <= 1.0


LONG = [
    pytest.param(piece, marks=pytest.mark.long) for piece in ("<", "* ", "a", "\n", " \n", "{", "Section 1", "\u0301")
]


@pytest.mark.parametrize("piece", ["*", "[", "<<a", *LONG])
def test_a_huge_answer_takes_no_age(piece: str) -> None:
    """Quadratic work on 300,000 characters would not end within the test's limit."""
    answer = piece * (300_000 // len(piece))
    for instruction, _, _ in CASES:
        assert scores(answer, instruction) in ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0))


def test_a_pattern_without_end_is_refused_by_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_rules, "PATTERN_SECONDS", 0.05)
    with pytest.raises(DataError, match=r"s/1: checks\.instructions: .*\(a\|a\)\+\$, which takes more than"):
        scores("a" * 60 + "b", {"kind": "required", "value": "(a|a)+$"})


# --- beside the code of IFEval, as lm-eval carries it ------------------------------------------------------------

TEXTS = [
    "Hello there.\n\n* one point\n* two points\n\nP.S. call me",
    "HELLO AGAIN THERE MY FRIEND",
    "hello again there my friend",
    '"All of it in quotation marks"',
    "<<A title>>\nIt rained, and rained. The lamp was on. A lamp!",
    "first part\n***\nsecond part",
    "first answer\n******\nsecond answer",
    "same\n******\nsame",
    "Section 1\nalpha\nSection 2\nbeta\nSection 3\ngamma",
    "Dear [name] of [street] in [town]: *one* and **two** and *three*",
    '{"a": 1, "b": [2, 3]}',
    "42 words are not here",
    "Then comes b.\n\nSecond comes here.\n\nThird paragraph.",
    "Is there anything else I can help with?",
    "My answer is yes.",
    "Le colis a quitt\u00e9 notre entrep\u00f4t et sera chez vous vendredi matin, promis.",
    "The parcel has left our warehouse and will be with you on Friday morning.",
    "Sure, here it is:\nmy answer is yes and no\nBye, and thanks",
    "",
]
# Their id and arguments, and ours, where both mean the same.
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("keywords:existence", {"keywords": ["lamp"]}, {"kind": "includes", "value": ["lamp"]}),
    ("keywords:existence", {"keywords": ["there", "my"]}, {"kind": "includes", "value": ["there", "my"]}),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["lamp", "here"]},
        {"kind": "excludes", "value": ["lamp", "here"]},
    ),
    (
        "keywords:frequency",
        {"keyword": "lamp", "frequency": 2, "relation": "at least"},
        {"kind": "word_count", "word": "lamp", "at_least": 2},
    ),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 5, "let_relation": "less than"},
        {"kind": "letter_count", "letter": "e", "at_most": 4},
    ),
    (
        "length_constraints:number_words",
        {"num_words": 8, "relation": "at least"},
        {"kind": "min_words", "value": 8},
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, {"kind": "parts", "exactly": 2}),
    ("detectable_content:number_placeholders", {"num_placeholders": 3}, {"kind": "placeholders", "at_least": 3}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, {"kind": "postscript"}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, {"kind": "bullets", "at_least": 2, "at_most": 2}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 3}, {"kind": "highlights", "at_least": 3}),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 3},
        {"kind": "sections", "at_least": 3},
    ),
    ("detectable_format:json_format", {}, {"kind": "json_only"}),
    ("detectable_format:title", {}, {"kind": "title"}),
    (
        "combination:two_responses",
        {},
        {"kind": "parts", "exactly": 2, "divider": "******", "different": True},
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Hello"}, {"kind": "repeats", "value": "Hello"}),
    (
        "startend:end_checker",
        {"end_phrase": "Is there anything else I can help with?"},
        {"kind": "ends_with", "value": "Is there anything else I can help with?"},
    ),
    ("startend:quotation", {}, {"kind": "quoted"}),
    ("punctuation:no_comma", {}, {"kind": "no_commas"}),
]


@pytest.fixture(scope="module")
def ifeval() -> Any:
    """IFEval's code; it would download a model for sentences, which is not needed here."""
    nltk = pytest.importorskip("nltk", reason="nltk is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_: None)
        return pytest.importorskip(
            "lm_eval.tasks.ifeval.utils",
            reason="lm-eval or what its IFEval needs (langdetect, immutabledict) is not installed",
            exc_type=ImportError,
        )


@pytest.mark.parametrize(("theirs", "arguments", "ours"), SAME)
def test_as_ifeval_says(ifeval: Any, theirs: str, arguments: dict[str, Any], ours: dict[str, Any]) -> None:
    asked_of_them = SimpleNamespace(instruction_id_list=[theirs], kwargs=[arguments], prompt="Hi")
    for text in TEXTS:
        strict = ifeval.test_instruction_following_strict(asked_of_them, text).follow_all_instructions
        loose = ifeval.test_instruction_following_loose(asked_of_them, text).follow_all_instructions
        assert scores(text, ours) == (strict, loose), text


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("change_case:english_capital", {"kind": "upper_case"}),
        ("change_case:english_lowercase", {"kind": "lower_case"}),
        ("language:response_language", {"kind": "language", "value": "fr"}),
    ],
)
def test_case_and_language_as_ifeval_says_of_whole_sentences(ifeval: Any, theirs: str, ours: dict[str, Any]) -> None:
    """Another model tells the language there: only texts that leave no doubt are compared, strictly."""
    arguments = [{"language": "fr"}] if "language" in theirs else [{}]
    asked_of_them = SimpleNamespace(instruction_id_list=[theirs], kwargs=arguments, prompt="Hi")
    french, english = TEXTS[15], TEXTS[16]
    for text in (english, english.upper(), english.lower(), *([french] if "language" in theirs else [])):
        assert (
            scores(text, ours)[0]
            == ifeval.test_instruction_following_strict(asked_of_them, text).follow_all_instructions
        )


def test_two_instructions_as_ifeval_says(ifeval: Any) -> None:
    ids = ["punctuation:no_comma", "keywords:existence"]
    asked_of_them = SimpleNamespace(instruction_id_list=ids, kwargs=[{}, {"keywords": ["yes"]}], prompt="Hi")
    ours = ({"kind": "no_commas"}, {"kind": "includes", "value": ["yes"]})
    for text in TEXTS:
        strict = ifeval.test_instruction_following_strict(asked_of_them, text).follow_all_instructions
        loose = ifeval.test_instruction_following_loose(asked_of_them, text).follow_all_instructions
        assert scores(text, *ours) == (strict, loose), text


def test_the_first_word_of_a_paragraph_as_ifeval_says(ifeval: Any) -> None:
    """There the number of paragraphs is a part of it."""
    arguments = {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "second"}
    three = [{"kind": "min_paragraphs", "value": 3}, {"kind": "max_paragraphs", "value": 3}]
    asked_of_them = SimpleNamespace(
        instruction_id_list=["length_constraints:nth_paragraph_first_word"], kwargs=[arguments], prompt="Hi"
    )
    for text in TEXTS:
        strict = ifeval.test_instruction_following_strict(asked_of_them, text).follow_all_instructions
        assert scores(text, {"kind": "first_word", "word": "second", "paragraph": 2}, *three)[0] == strict, text
