"""Rows of every version become rows of today, and what no version knows is a bad row that says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from sftdist.core.errors import ConfigError
from sftdist.core.settings import DataSettings, ModelSettings, RowShape, SourceSettings
from sftdist.data.request import request_of
from sftdist.data.rowerror import RowError
from sftdist.data.schema import SCHEMA_VERSION, Conversation, parse
from sftdist.data.sources import Source, fingerprint, in_memory, parts_of
from sftdist.data.versions import MIGRATIONS, of_today

ROW = {"prompt": "q", "completion": "a"}


def labels(row: dict[str, Any], **source: Any) -> tuple[tuple[str, ...], str | None]:
    found = parse({**ROW, **row}, RowShape.auto, file="f", line=1, id=None, **source)
    assert isinstance(found, Conversation), str(found)
    return found.tags, found.label_origin


def problem(row: dict[str, Any], **source: Any) -> str:
    return str(parse({**ROW, **row}, RowShape.auto, file="f", line=1, id=None, **source))


def test_every_older_version_has_its_step() -> None:
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, ((), None)),
        ({"origin": "human"}, ((), "human")),
        ({"origin": " gpt-4 "}, ((), "synthetic:gpt-4")),
        ({"origin": "synthetic:gpt-4"}, ((), "synthetic:gpt-4")),
        ({"origin": ""}, ((), None)),
        ({"label_origin": "human"}, ((), "human")),  # a row that is half new already
        ({"tags": "billing, refund,,billing "}, (("billing", "refund"), None)),
        ({"tags": ["billing, refund"]}, (("billing, refund",), None)),  # a list is a list in version 1, too
        ({"tags": ""}, ((), None)),
    ],
)
def test_rows_of_version_1(row: dict[str, Any], found: tuple[tuple[str, ...], str | None]) -> None:
    assert labels({**row, "schema_version": 1}) == found
    assert labels(row, schema_version=1) == found
    raw = {**ROW, **row}
    of_today(raw, 1)
    assert raw == {**ROW, **row}, "the row of the caller stays as it is"


def test_rows_of_today() -> None:
    assert labels({"tags": ["x", "y", "x"], "label_origin": "synthetic:a b"}) == (("x", "y"), "synthetic:a b")
    assert labels({"origin": 17}) == ((), None), "in version 2 this key means nothing"


def test_the_row_wins_over_its_source() -> None:
    assert labels({"origin": "human", "schema_version": 2}, schema_version=1) == ((), None)
    assert labels({"origin": "human", "schema_version": 1}, schema_version=2) == ((), "human")
    assert labels({"origin": "human", "schema_version": None}, schema_version=1) == ((), "human")
    assert labels({}, label_origin="human") == ((), "human")
    assert labels({"label_origin": "synthetic:m"}, label_origin="human") == ((), "synthetic:m")
    assert labels({"origin": "m"}, label_origin="human", schema_version=1) == ((), "synthetic:m")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"schema_version": 3},
            "f:1: schema_version: given 3, required a whole number from 1 to 2; newer rows need a newer sftdist",
        ),
        ({"schema_version": 0}, "f:1: schema_version: given 0, required a whole number from 1 to 2"),
        ({"schema_version": "1"}, 'f:1: schema_version: given "1", required a whole number from 1 to 2'),
        ({"schema_version": 1.0}, "f:1: schema_version: given 1.0, required a whole number from 1 to 2"),
        ({"schema_version": True}, "f:1: schema_version: given true, required a whole number from 1 to 2"),
        ({"label_origin": "gpt-4"}, 'f:1: label_origin: given "gpt-4", required human | synthetic:MODEL'),
        ({"label_origin": "synthetic:"}, 'f:1: label_origin: given "synthetic:", required human | synthetic:MODEL'),
        ({"label_origin": "synthetic: m"}, 'f:1: label_origin: given "synthetic: m", required human | synthetic:MODEL'),
        ({"label_origin": "Human"}, 'f:1: label_origin: given "Human", required human | synthetic:MODEL'),
        ({"label_origin": ""}, 'f:1: label_origin: given "", required human | synthetic:MODEL'),
        ({"label_origin": 1}, "f:1: label_origin: given 1, required human | synthetic:MODEL"),
        (
            {"tags": "a, b"},
            'f:1: tags: given "a, b", required a list of words (text with commas is schema_version 1: give the row or '
            "its source that)",
        ),
        ({"tags": ["a", 1]}, 'f:1: tags: given ["a", 1], required a list of words'),
        ({"tags": ["a", " "]}, 'f:1: tags: given ["a", " "], required a list of words'),
        ({"tags": {"a": 1}}, 'f:1: tags: given {"a": 1}, required a list of words'),
        ({"tags": ["\ud800"]}, "f:1: tags: given half of a surrogate pair at character 0, required Unicode text"),
        ({"schema_version": 1, "origin": 4}, "f:1: origin: given 4, required human, or the name of a model"),
        ({"schema_version": 1, "origin": " "}, 'f:1: origin: given " ", required human, or the name of a model'),
        (
            {"schema_version": 1, "origin": "human", "label_origin": "human"},
            "f:1: label_origin: given it beside origin, required origin alone (schema_version 1) or label_origin "
            "alone (2)",
        ),
        (
            {"schema_version": 1, "origin": "synthetic:"},
            'f:1: label_origin: given "synthetic:", required human | synthetic:MODEL',
        ),
    ],
)
def test_what_no_version_knows(row: dict[str, Any], message: str) -> None:
    assert problem(row) == message


def test_a_version_that_is_not_read_is_not_guessed() -> None:
    """The wrong variant: taking a newer row for one of today would read its fields with a meaning they have lost."""
    with pytest.raises(RowError, match="newer sftdist"):
        of_today({"schema_version": SCHEMA_VERSION + 1}, None)


def settings(**source: Any) -> DataSettings:
    return DataSettings(sources={"a": SourceSettings(path="a.jsonl", **source)})


def test_the_settings_of_a_source_reach_its_rows_and_are_checked() -> None:
    source = request_of(settings(schema_version=1, label_origin="human"), ModelSettings(path="m")).sources[0].source
    assert (source.schema_version, source.label_origin) == (1, "human")
    with pytest.raises(ConfigError) as caught:
        request_of(settings(schema_version=3, label_origin="gpt-4"), ModelSettings(path="m"))
    assert str(caught.value).splitlines() == [
        "data.sources.a.schema_version: given 3, required 1 to 2",
        "data.sources.a.label_origin: given 'gpt-4', required human or synthetic:MODEL",
    ]


def test_what_a_source_says_of_its_rows_is_part_of_its_content_key() -> None:
    def labelled(**said: Any) -> list[Any]:
        source = Source("s", rows=in_memory([ROW], "s", "dataset").rows, **said)
        return fingerprint(source, parts_of(source))["labels"]

    assert labelled() == labelled(schema_version=SCHEMA_VERSION), "the default is the newest, said or not"
    assert labelled() != labelled(schema_version=1)
    assert labelled() != labelled(label_origin="human")
