"""Evaluation prompts in training rows: quoted, reworded, short, templated; and what a file of prompts may look like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftdist.core.errors import DataError
from sftdist.data.contamination import Contamination, prompt_of
from sftdist.data.near import Near, signatures
from sftdist.data.schema import Conversation, Message

NEAR = Near(0.8, 3)
LONG = (
    "A farmer has seventeen sheep and buys eight more at the market, then sells all but nine of them. "
    "How many sheep does the farmer have in the evening, and how many did he sell on that day?"
)
NINE = "What is the capital city of the Burgundy region?"
SHORT = "Name three colours."


def chat(prompt: str, answer: str = "Sure.") -> Conversation:
    return Conversation("x", (Message("user", prompt), Message("assistant", answer)))


def found(prompts: list[str], *rows: Conversation) -> list[str | None]:
    against = Contamination.of_prompts([(f"bench:{i}", text) for i, text in enumerate(prompts)], NEAR)
    return against.of(rows, signatures(rows, NEAR))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (chat(LONG), "its prompt is nearly that of bench:0"),
        (chat(LONG.upper().replace(",", " -")), "its prompt is nearly that of bench:0"),
        (chat(LONG.replace("farmer", "shepherd", 1)), "its prompt is nearly that of bench:0"),
        (chat("Is this hard? " * 40 + LONG[:97]), "shares 13 words in a row with the prompt of bench:0"),
        (chat("Make an exercise.", f"Here: {LONG}"), "shares 13 words in a row with the prompt of bench:0"),
        (chat("A farmer has seventeen sheep and buys eight more at the market. Why?"), None),  # 12 words in a row
        (
            chat(f"I ask you this: {NINE} Tell me, and tell me more."),
            "shares 9 words in a row with the prompt of bench:1",
        ),
        (chat("What is the capital city of the Champagne region?"), None),
        (chat("name THREE colours"), "its prompt is nearly that of bench:2"),
        (chat("Name three colours. Then say which of them you like best, and why you like it."), None),
        (
            Conversation("x", (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", SHORT))),
            "a user turn is the prompt of bench:2",
        ),
        (chat("What is the weather like?"), None),
        (chat("..."), None),
    ],
)
def test_what_counts_as_contamination(row: Conversation, why: str | None) -> None:
    assert found([LONG, NINE, SHORT, "", "?!"], row) == [why]


def test_the_system_prompt_is_not_searched() -> None:
    row = Conversation("x", (Message("system", LONG), *chat("What is the weather like?").messages))
    assert found([LONG], row) == [None]


def test_the_template_of_an_evaluation_is_not_what_it_asks() -> None:
    template = "Answer the following question. Think step by step, and give the answer in the last line as a number."
    questions = [
        f"{template} How many {a}s are there in a dozen {a} boxes of {n}?" for n in range(2) for a in "abcdefg"
    ]
    row = chat(f"{template} {' '.join(f'w{i}' for i in range(30))}")
    assert found(questions, row) == [None]
    assert found(questions[:10], row) != [None]  # few prompts are no template
    assert found(questions, chat(questions[3])) != [None]


def test_without_prompts_nothing_is_found() -> None:
    assert found([], chat(LONG)) == [None]
    assert found([LONG]) == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "P?"},
        {"question": "P?", "answer": "#### 4"},
        {"prompt": "P?", "completion": "yes"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "P?"}]},
        {"instruction": "P?"},
        {"instruction": "P?", "output": "yes"},
        {"messages": [{"role": "user", "content": "P?"}]},
        {"messages": [{"role": "user", "content": "P?"}, {"role": "assistant", "content": "yes"}]},
        {"conversations": [{"from": "human", "value": "P?"}]},
    ],
)
def test_prompts_of_rows_of_any_shape(row: dict[str, object]) -> None:
    assert prompt_of(row) == "P?"


def test_files_of_prompts(tmp_path: Path) -> None:
    rows = tmp_path / "bench.jsonl"
    rows.write_text("\n".join(json.dumps({"question": text}) for text in (NINE, LONG)) + "\n\n")
    lines = tmp_path / "more.txt"
    lines.write_text(f"{SHORT}\n\nAnother prompt\n")
    against = Contamination.load([rows, lines], NEAR)
    assert against.names == ("bench.jsonl:1", "bench.jsonl:2", "more.txt:1", "more.txt:3")
    assert prompt_of({"instruction": "Add.", "input": "1 2"}) == "Add.\n\n1 2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": 3}\n', r"bench.jsonl:1: row: .*required a prompt \(prompt \| question"),
        ('{"question": "a"}\n[1]\n', "bench.jsonl:2: row"),
        ("what is this\n", "bench.jsonl:1: line: .*required one JSON object per line"),
        ("", "given an empty file"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bench.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        Contamination.load([file], NEAR)
    with pytest.raises(DataError, match=r"data.decontaminate: given .*none.jsonl, which does not exist"):
        Contamination.load([tmp_path / "none.jsonl"], NEAR)
