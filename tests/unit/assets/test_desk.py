"""The quickstart's sources: the same everywhere, each answer follows from its prompt, no prompt twice."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sftdist.assets import desk
from sftdist.assets.words import CATEGORIES, COUNTS
from sftdist.core.settings import RowShape
from sftdist.core.storage import sha256_json
from sftdist.data.schema import Conversation, parse

PINNED = {
    "domain": "c420c72d066749dd90fcfb7675a48f01ac501c524584b66c94feec0fb259bd90",
    "general": "eb6037e8d2b111dc2d9a2b0c165f37e093d45e462bce27b9be3150f11fb83086",
    "format": "5fbb86ba460bdf161454e943ba05d49a4335c833243216a40b34b25d0719aee1",
}


@pytest.fixture(scope="module")
def sources() -> dict[str, list[dict[str, Any]]]:
    return {source: desk.rows(source) for source in desk.ROWS}


@pytest.mark.parametrize("source", desk.ROWS)
def test_the_rows_are_the_same_on_every_machine(source: str, sources: dict[str, list[dict[str, Any]]]) -> None:
    assert sha256_json(sources[source]) == PINNED[source]


def test_there_are_some_thousand_conversations_and_no_prompt_or_id_comes_twice(
    sources: dict[str, list[dict[str, Any]]],
) -> None:
    rows = [row for rows in sources.values() for row in rows]
    assert 2000 <= len(rows) <= 6000
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({tuple(desk.texts(row)[:-1]) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("source", "shape"), [("domain", RowShape.messages), ("general", RowShape.alpaca), ("format", RowShape.sharegpt)]
)
def test_each_source_has_a_shape_of_its_own(
    source: str, shape: RowShape, sources: dict[str, list[dict[str, Any]]]
) -> None:
    for row in sources[source]:
        found, named = (parse(row, kind, file="f", line=1, id=None) for kind in (RowShape.auto, shape))
        assert isinstance(found, Conversation)
        assert found == named
        assert found.messages[-1].content == desk.texts(row)[-1]


def test_a_phrase_of_a_customer_means_one_problem() -> None:
    phrases = [phrase for phrases, _ in desk.PROBLEMS.values() for phrase in phrases]
    assert len(set(phrases)) == len(phrases)
    for problem, (own, _) in desk.PROBLEMS.items():
        assert not any(one in other for one in own for other in phrases if other not in own), problem
    assert not set(desk.URGENT) & set(desk.CALM)


def _problem(text: str) -> str:
    (found,) = [problem for problem, (phrases, _) in desk.PROBLEMS.items() if any(phrase in text for phrase in phrases)]
    return found


def _product(text: str) -> str:
    (found,) = [product for product in desk.PRODUCTS if re.search(rf"\b{product}\b", text)]
    return found


def test_domain_answers_follow_from_policy_and_ticket(sources: dict[str, list[dict[str, Any]]]) -> None:
    for row in sources["domain"]:
        _, prompt, answer = desk.texts(row)
        policy, mail = prompt.split("\n")
        problem = _problem(mail)
        (remedy,) = re.findall(rf"{problem}: (\w+)\.", policy)
        (days,) = re.findall(r"All in (\d+) days", policy)
        (ticket,) = re.findall(r"Ticket (\d{5})", mail)
        (who,) = re.findall(r"(?:My name is|from|Regards,) ([A-Z][a-z]+) [A-Z]", mail)
        team = desk.PROBLEMS[problem][1]
        assert answer == (
            f"Hello {who}, sorry about the {_product(mail)}. Our policy says {problem}: {remedy}, in {days} days. "
            f"The {team} team takes care of ticket {ticket}."
        )


def test_tickets_are_valid_under_the_schema_and_follow_from_the_mail(
    sources: dict[str, list[dict[str, Any]]],
) -> None:
    validator = Draft202012Validator(desk.SCHEMA)
    for row in sources["format"]:
        _, mail, answer = desk.texts(row)
        value = json.loads(answer)
        validator.validate(value)
        assert value == {
            "ticket": int(re.findall(r"\b\d{5}\b", mail)[0]),
            "customer": re.findall(r"[A-Z][a-z]{2,} [A-Z][a-z]{2,}", mail)[0],
            "product": _product(mail),
            "order": re.findall(r"[A-Z]-\d{4}", mail)[0],
            "problem": _problem(mail),
            "urgent": any(mood in mail for mood in desk.URGENT),
        }


def _expected(task: str, text: str) -> str:
    words = text.replace(",", "").split()
    match task:
        case "Copy the words.":
            return text
        case "Write the words in reverse order.":
            return " ".join(words[::-1])
        case "Write in capital letters.":
            return text.upper()
        case "Count the words. Answer with a word.":
            return COUNTS[len(words)]
        case "Give the first word only.":
            return words[0]
        case "Give the last word only.":
            return words[-1]
        case "Greet the person and name the town.":
            return "Hello {}, how is {} today?".format(*text.split(" from "))
        case "Make a sentence with these words.":
            return "{} has a {} and a {}.".format(*text.split(", "))
    (kind,) = re.findall(r"Pick the (\w+)\.", task)
    (fits,) = set(words) & set(CATEGORIES[kind])
    return fits


def test_general_answers_follow_from_the_instruction(sources: dict[str, list[dict[str, Any]]]) -> None:
    for row in sources["general"]:
        assert row["output"] == _expected(row["instruction"], row["input"])
