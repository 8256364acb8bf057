"""The base model's text: deterministic, answers marked where they stand, nothing of the support desk in it."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from sftdist.assets import base_text, desk
from sftdist.assets.base_text import documents

SAMPLE = 5000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in islice(documents(0), SAMPLE)]


def test_a_seed_gives_the_same_stream(texts: list[str]) -> None:
    assert [document.text for document in islice(documents(0), 50)] == texts[:50]
    assert [document.text for document in islice(documents(1), 50)] != texts[:50]


def test_the_marked_spans_are_the_answers() -> None:
    for document in islice(documents(2), 300):
        marked = [document.text[start:end] for start, end in document.answers]
        if document.text.startswith("<|im_start|>"):
            replies = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", document.text, re.DOTALL)
            assert marked == replies
        else:
            assert marked[-1] == "<|endoftext|>"


def test_the_text_knows_no_desk_and_no_json(texts: list[str]) -> None:
    everything = "\n".join(texts)
    assert "{" not in everything
    assert "JSON" not in everything
    found = set(re.findall(r"[a-z]+", everything.lower()))
    problem_words = {"overcharged", "missing"} | {team for _, team in desk.PROBLEMS.values()}
    assert not found & ({"ticket", "policy", "order", "customer", "urgent", "support", *desk.REMEDIES} | problem_words)


def test_no_prompt_of_the_sources_is_in_the_text(texts: list[str]) -> None:
    everything = "\n".join(texts)
    for source in desk.ROWS:
        for row in desk.rows(source):
            *_, prompt, _ = desk.texts(row)
            instruction = row.get("instruction")
            assert (instruction or prompt) not in everything


def test_soup_brings_every_word_of_the_vocabulary() -> None:
    vocabulary = [f"word{letter}" for letter in "abcdefghijklmnopqrst"]
    everything = " ".join(document.text for document in islice(documents(4, vocabulary), 300))
    assert all(word in everything for word in vocabulary)


@pytest.mark.parametrize("form", [name for name, _ in base_text.FORMS])
def test_no_form_writes_json(form: str) -> None:
    written = dict(base_text.FORMS)[form]([("lamp", "red"), ("key", "7")])
    assert not written.startswith(("{", "["))
