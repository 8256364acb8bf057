"""Cut answers are told from finished ones by what is open at their end; finished ones are left in peace."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.core.settings import TrainOn
from sftdist.data import doubts as signs
from sftdist.data.doubts import doubt, doubts
from sftdist.data.schema import Conversation, Message


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", signs.EMPTY),
        (" \n", signs.EMPTY),
        ("...", signs.EMPTY),
        ("\u200b\ufeff", signs.EMPTY),
        ("---", signs.EMPTY),
        ("Try:\n```python\nprint(1)\n", signs.FENCE),
        ("```\na\n```\nand\n```", signs.FENCE),
        ("Take salt, pepper,", signs.GOES_ON),
        ("These are the steps:\n", signs.GOES_ON),
        ("\u9700\u8981\u4ee5\u4e0b\u6750\u6599\uff1a", signs.GOES_ON),
        ("1. Salt\n2. Pepper\n3.", signs.MARKER),
        ("* Salt\n*", signs.MARKER),
        ("It costs 5 (about 4", signs.BRACKET),
        ('{"name": "Tea", "price"', signs.BRACKET),
        ("def f(x):\n    return g(x", signs.BRACKET),
        ("<think>The user wants a number.", signs.THOUGHT),
        ("| a | b |\n|---|---|\n| 1 | 2", signs.TABLE),
        ("We went to the", signs.WORD),
        ("Wir gehen nach Hause und", signs.WORD),
        ('He said "I will', signs.QUOTE),
        ("Run `make", signs.QUOTE),
        ("It is late. We should go ho", signs.SENTENCE),
        ("It was in 2148. We should go ho", signs.SENTENCE),
        ('"No!" she said. "Never." Then she le', signs.SENTENCE),
        ("\u5929\u6c14\u5f88\u597d\u3002\u6211\u4eec\u53bb", signs.SENTENCE),
    ],
)
def test_what_is_open(answer: str, reason: str) -> None:
    assert doubt(answer) == reason


@pytest.mark.parametrize(
    "answer",
    [
        "42",
        "Paris",
        "yes",
        "[]",
        "A number in [a, b) or [a, b].",
        "{}",
        "+",
        "\U0001f44d",
        "5.",
        "C",
        "It is late. We should go home.",
        "It is late! :(",
        "Thank you. I am sad :-( today.",
        "The interval is [0, 1) and (0, 1].",
        "def f(x):\n    return x + y",
        "lambda x, y: x + y",
        "sum = lambda a: 1 + a",
        "find . -type f -name '*.txt' -print",
        "echo 'Hello world!' > example.txt",
        "SELECT name FROM users ORDER BY name",
        "Dear Sir. I am in London. Yours sincerely, Ada Lovelace",
        "Good luck with it! - Harry",
        "I hope this helps. Best wishes, Ada",
        "1. Salt\n2. Pepper",
        "Roses are red\nViolets are blue",
        "```python\nprint('(')\n```",
        "Use ``` to open. Use ``` to close.",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "Natalia sold 48/2 = <<48/2=24>>24 clips\n#### 72",
        "See www.example.com",
        "\u5929\u6c14\u5f88\u597d\u3002\u6211\u4eec\u53bb\u3002",
        "Vitamin A",
        "5'10\" tall.",
    ],
)
def test_what_is_finished(answer: str) -> None:
    assert doubt(answer) is None


def test_only_trained_answers_count() -> None:
    cut, fine = "We went to the", "We went home."
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = Conversation(
        "a",
        (
            Message("user", cut),
            Message("assistant", cut, train=False),
            Message("user", cut),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", cut),
            Message("assistant", "", reasoning="x"),
            Message("user", cut),
            Message("assistant", cut),
            Message("user", cut),
            Message("assistant", fine),
        ),
    )
    assert [(found.turn, found.reason) for found in doubts(row, TrainOn.all)] == [(2, signs.EMPTY), (3, signs.WORD)]
    assert str(doubts(row, TrainOn.all)[1]) == f'assistant turn 3: {signs.WORD}: "We went to the"'
    assert doubts(row, TrainOn.last) == []
    assert doubts(row, TrainOn.flagged) == []


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_doubted(text: str) -> None:
    doubt(text)


@pytest.mark.parametrize(
    "text", ["a" * 300_000, "a. " * 100_000, "(" * 200_000 + "x", ":" * 200_000 + "(x", "\n" * 300_000 + "x"]
)
def test_long_answers_take_linear_time(text: str) -> None:
    start = time.process_time()
    doubt(text)
    assert time.process_time() - start < 1


# --- real answers -----------------------------------------------------------------------------------------


def _answers(folder: Path) -> Iterator[tuple[str, str]]:
    for name in ("general_gpteacher.alpaca", "domain_gsm8k.messages", "format_toolformer.sharegpt"):
        for line in (folder / f"{name}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            last = row["output"] if "output" in row else [*row.get("messages", []), *row.get("conversations", [])][-1]
            answer = last if isinstance(last, str) else last.get("content", last.get("value"))
            yield row["id"].partition("-")[0], answer


def test_real_answers_raise_few_doubts_and_cut_ones_many(shared_data: Path) -> None:
    """Measured: 6 doubts in 19,489 answers, 2 of them about brackets that are open indeed; of the cut ones those of
    prose and code are found at 78 % and 65 %. Lines without marks (gsm8k) look the same when they are cut."""
    answers = list(_answers(shared_data))
    alarms = [answer for _, answer in answers if doubt(answer) is not None]
    assert len(alarms) <= 20
    assert len(answers) > 19_000
    dice = random.Random(0)
    for kind, at_least in (("roleplay", 0.74), ("codegen", 0.62), ("toolformer", 0.47), ("gsm8k", 0.04)):
        texts = [answer.strip() for found, answer in answers if found == kind and len(answer.strip()) >= 40]
        cut = [text[: dice.randrange(20, len(text))] for text in texts]
        assert sum(doubt(text) is not None for text in cut) >= at_least * len(cut)
