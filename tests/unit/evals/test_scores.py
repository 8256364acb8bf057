"""Scores see what is wrong, and only that."""

from __future__ import annotations

import pytest

from sftdist.evals.scores import fields_right, parse_object, same_answer, same_text, valid_under

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "urgent": {"type": "boolean"}},
    "required": ["n", "urgent"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"n": 1, "urgent": true}', 1.0),
        (' {"n": 1, "urgent": true}\n', 1.0),
        ('{"n": 1, "urgent": true} and more', 0.0),
        ('{"n": 1, "urgent": true', 0.0),
        ('{"n": NaN, "urgent": true}', 0.0),
        ('{"n": "1", "urgent": true}', 0.0),
        ('{"n": 1}', 0.0),
        ('{"n": 1, "urgent": true, "x": 0}', 0.0),
        ("[1]", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_valid_under(answer: str, valid: float) -> None:
    assert valid_under(answer, SCHEMA) == valid


def test_fields_are_compared_with_their_type() -> None:
    reference = '{"n": 1, "urgent": true}'
    assert fields_right(reference, reference) == 1.0
    assert fields_right('{"urgent": true, "n": 1}', reference) == 1.0
    assert fields_right('{"n": true, "urgent": 1}', reference) == 0.0
    assert fields_right('{"n": 1, "urgent": false}', reference) == 0.5
    assert fields_right("no JSON", reference) == 0.0
    assert parse_object("[]") is None
    with pytest.raises(ValueError, match="required a JSON object"):
        fields_right(reference, "[]")


def test_what_equal_answers_may_differ_in() -> None:
    assert same_answer("Hello  Ana,\nyes.", "hello Ana, yes.") == 1.0
    assert same_answer("Hello Ana, yes", "Hello Ana, yes.") == 0.0
    assert same_text(" LAMP ", "LAMP") == 1.0
    assert same_text("lamp", "LAMP") == 0.0
