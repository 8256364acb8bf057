"""Rows of live traffic: what is read, what is left out and named, and when there is too much of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.errors import DataError
from sftdist.evals.traffic import LiveRow, Traffic, read_traffic

USER = {"role": "user", "content": "And now?"}
HISTORY = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}, USER]
GOOD = {"prompt": "Where is my lamp?", "timestamp": "2026-01-01T00:00:00Z"}


def read(folder: Path, *rows: object) -> Traffic:
    file = folder / "live.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_traffic(str(file))


def one(folder: Path, row: Any) -> LiveRow:
    found = read(folder, row)
    assert found.bad == []
    return found.rows[0]


def test_both_shapes_with_and_without_an_answer(tmp_path: Path) -> None:
    plain = one(tmp_path, GOOD)
    assert (plain.prompt, plain.answer) == ("Where is my lamp?", None)
    assert plain.place.endswith("live.jsonl:1")
    assert one(tmp_path, {**GOOD, "answer": "Here."}).answer == "Here."
    asked = one(tmp_path, {"messages": HISTORY})
    assert (asked.prompt, asked.answer, len(asked.messages)) == ("And now?", None, 3)
    said = {"role": "assistant", "content": "Later."}
    answered = one(tmp_path, {"messages": [*HISTORY, said]})
    assert (answered.prompt, answered.answer, len(answered.messages)) == ("And now?", "Later.", 3)
    assert one(tmp_path, {"messages": [*HISTORY, said], "answer": "Later."}).answer == "Later."


@pytest.mark.parametrize("nothing", ["", " ", None])
def test_an_answer_that_is_empty_is_an_answer(tmp_path: Path, nothing: str | None) -> None:
    """As `{"answer": ""}` is."""
    found = one(tmp_path, {"messages": [*HISTORY, {"role": "assistant", "content": nothing}]})
    assert (found.prompt, found.answer) == ("And now?", nothing or "")
    assert one(tmp_path, {**GOOD, "answer": ""}).answer == ""


def test_an_answer_of_tool_calls_is_their_json(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": '{"id": 7}'}}]}
    found = one(tmp_path, {"messages": [*HISTORY, call]})
    assert json.loads(str(found.answer)) == [{"name": "find", "arguments": {"id": 7}}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "required prompt or messages"),
        ({"question": "Why?"}, "keys question"),
        ({**GOOD, "messages": HISTORY}, "given both"),
        ({"prompt": "  "}, "required text"),
        ({"prompt": 7}, "required text"),
        ({"messages": "Hello"}, "required a list of messages"),
        ({"messages": []}, "required at least one"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "without a user turn"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, r"messages\[0\].role"),
        ({"messages": [*HISTORY, {"role": "assistant", "content": "A"}], "answer": "B"}, "one answer"),
        ({"messages": [*HISTORY, {"role": "assistant", "content": ""}], "answer": "B"}, "one answer"),
        ({"messages": [*HISTORY, {"role": "assistant", "text": "A"}]}, "given nothing, required text"),
        ({"messages": [*HISTORY, {"role": "assistant", "content": ""}, USER]}, "given empty text"),
        ({"messages": [*HISTORY, {"role": "user", "content": ""}]}, "given empty text"),
        ({**GOOD, "answer": ["A", 3]}, "answer"),
        ([1], "a JSON object"),
        ("{not JSON}", "one JSON object per line"),
        ('{"prompt": "a", "prompt": "b"}', "each key once"),
    ],
)
def test_bad_rows_are_named_and_too_many_are_refused(tmp_path: Path, row: object, said: str) -> None:
    few = read(tmp_path, *[GOOD] * 99, row)
    assert (len(few.rows), sum(few.reasons.values()), len(few.bad)) == (99, 1, 1)
    assert "live.jsonl:100: " in few.bad[0]
    with pytest.raises(DataError, match=said) as refused:
        read(tmp_path, *[GOOD] * 98, row, row)
    assert "2 bad rows of 100" in str(refused.value)
    assert refused.value.exit_code == 3


def test_a_last_line_that_breaks_off_is_no_bad_row(tmp_path: Path) -> None:
    """A log that is being written ends so."""
    file = tmp_path / "live.jsonl"
    file.write_text(json.dumps(GOOD) + '\n{"prompt": "Whe')
    found = read_traffic([str(file)])
    assert (len(found.rows), found.bad, found.torn) == (1, [], 1)


def test_no_file_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"traffic: given .* which does not exist"):
        read_traffic(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="given an empty file"):
        read_traffic(str(tmp_path / "empty.jsonl"))
