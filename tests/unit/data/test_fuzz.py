"""Whatever a row is, it becomes a conversation or a bad row: the parser does not end otherwise, and no row is lost."""

from __future__ import annotations

import copy
import datetime
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftdist.core.settings import RowShape
from sftdist.data.keys import answer_key, content_key, prompt_key
from sftdist.data.problems import bad_row
from sftdist.data.schema import Conversation
from sftdist.data.sources import Chunk, Parsed, Part, Source, conversations, parse_chunk

LONG_SECONDS = 120.0
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, {"y": None}]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
# One of everything that a row may hold: what is mutated.
SOUND: list[dict[str, Any]] = [
    {
        "id": "m",
        "schema_version": 2,
        "tags": ["billing", "refund"],
        "label_origin": "synthetic:some-model",
        "tools": [TOOL],
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "weather?"}], "name": "eve"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "look it up"},
            {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"},
            {"role": "assistant", "content": "sunny ☀", "train": True, "weight": 0.5},
        ],
    },
    {"schema_version": 1, "tags": "a, b", "origin": "human", "prompt": "q", "completion": "a"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"instruction": "do", "input": "x", "output": "y", "system": "s", "history": [["q", "a"], ["q2", "a2"]]},
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a", "tool_calls": [CALL], "thinking": "t"},
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "b", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
        ],
        "tools": json.dumps([TOOL]),
        "system": "s",
    },
]

# --- what is thrown at it -------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, 0, -1, 2, 10**400, -(10**400), 0.5, math.nan, math.inf, -0.0, 1e300),
    *("", " \n", "user", "human", "\ud800", "a\udfff", "\x00", "<|im_end|>", "{", "[" * 2000, "1" * 5000, "null"),
    *('{"x": NaN}', '{"a": 1, "a": 2}', "[" * 3000, '{"x": ' + "9" * 4400 + "}", "synthetic:", "1"),
    *([], {}, [[]], [{}], [None], {"": {}}, [["q", "a"]], ["q"], {"type": "text"}, {"text": "t"}, {"type": "image"}),
]
KEYS = sorted({key for row in SOUND for key in row} | {"role", "content", "from", "value", "text", "type", "weight"})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD).map(copy.deepcopy)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5)
SHAPES = st.sampled_from(list(RowShape))
VERSIONS = st.none() | st.integers(1, 2)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a row."""
    found = [path]
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


PLACES = [(row, path) for row in SOUND for path in places(row) if path]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A sound row with one to three things in it replaced, removed, renamed or doubled."""
    row = copy.deepcopy(draw(st.sampled_from(SOUND)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(row)))
        if not path:
            continue
        holder = row
        for key in path[:-1]:
            holder = holder[key]
        _change(holder, path[-1], draw)
    return row


def _change(holder: Any, key: Any, draw: st.DrawFn) -> None:
    kind = draw(st.sampled_from(("replace", "remove", "rename", "double", "wrap")))
    if kind == "replace":
        holder[key] = draw(JSON)
    elif kind == "remove":
        del holder[key]
    elif kind == "wrap":
        holder[key] = draw(st.sampled_from(([holder[key]], {"text": holder[key]}, json.dumps(holder[key]))))
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(holder[key])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The line of a mutated row with bytes changed, taken out or put in."""
    line = bytearray(json.dumps(draw(st.sampled_from(SOUND) | mutated())).encode())
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(line)))
        end = min(len(line), start + draw(st.sampled_from((0, 0, 1, 7, 1000))))
        line[start:end] = draw(st.binary(max_size=4) | st.sampled_from((b'"', b"\\", b"}", b"]", b"\\ud83d", b"\xff")))
    return bytes(line)


def _array(values: list[Any]) -> np.ndarray:
    """As pandas gives a list of a table."""
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


NO_JSON = st.sampled_from(
    [
        *(b"bytes", datetime.datetime(2025, 1, 1), {1, 2}, object, 1j, np.float32(0.5), np.int64(3), np.bool_(True)),
        *(np.zeros((2, 2)), np.array([]), np.str_("x"), {1: "a"}, {("a", "b"): 1}, range(3), ("q", "a")),
    ]
)
TABLE_VALUES = st.recursive(
    SCALARS | NO_JSON,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(_array)
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def table_rows(draw: st.DrawFn) -> Any:
    """A row of a table: values that no JSON can hold, anywhere in a sound row, or by themselves."""
    if draw(st.booleans()):
        return draw(st.dictionaries(st.sampled_from(KEYS) | st.integers(), TABLE_VALUES, max_size=5) | TABLE_VALUES)
    row = copy.deepcopy(draw(st.sampled_from(SOUND)))
    path = draw(st.sampled_from(places(row)[1:]))
    holder = row
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = draw(TABLE_VALUES)
    return row


# --- what must hold -------------------------------------------------------------------------------------------


def parsed(raw: bytes | Any, shape: RowShape = RowShape.auto, version: int | None = None, torn: bool = False) -> Parsed:
    """One row through the parser; whatever came out can be hashed, compared, written and shown."""
    source = Source("s", shape=shape, schema_version=version)
    found = parse_chunk(Chunk(0, [(7, raw)], torn=torn), source, Part("f.jsonl", "f.jsonl"))
    assert (found.read, found.left_out) == (1, 0)
    assert len(found.conversations) + len(found.rejected) == 1, "a row is one conversation or one problem"
    for conversation, given_row in found.conversations:
        assert given_row is raw
        _sound(conversation)
    for rejected in found.rejected:
        written = bad_row("s", rejected).to_dict("f.jsonl")
        assert json.loads(json.dumps(written, ensure_ascii=False).encode()) == written
        assert str(rejected.reject).encode().startswith(b"f.jsonl:7: ")
        assert rejected.reject.reason
    return found


def _sound(conversation: Conversation) -> None:
    for key in (content_key, prompt_key, answer_key):
        assert len(key(conversation)) == 16
    everything = [vars_of(message) for message in conversation.messages], conversation.tools, conversation.tags
    json.dumps([conversation.id, conversation.label_origin, *everything], ensure_ascii=False, allow_nan=False).encode()
    assert conversation.messages[0].role != "assistant"
    assert any(message.role == "assistant" for message in conversation.messages)
    assert all(0 <= message.weight <= 1e6 for message in conversation.messages)


def vars_of(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__slots__}


def lines_of(row: bytes, torn: bool) -> None:
    parsed(row, torn=torn)


def json_rows(row: Any, shape: RowShape, version: int | None) -> None:
    """Also: what is read from a line is what is read from a table, where neither has nulls."""
    line = json.dumps(row).encode()
    from_line = parsed(line, shape, version)
    if isinstance(row, Mapping) and b"null" not in line:
        from_table = parsed(json.loads(line, parse_constant=float), shape, version)
        if not any(word in line for word in (b"NaN", b"Infinity", b"9" * 1001, b"0" * 400)):  # no JSON in a line
            assert outcome(from_line) == outcome(from_table)


def outcome(found: Parsed) -> list[Any]:
    rows: list[Any] = [conversation for conversation, _ in found.conversations]
    return rows + [(str(rejected.reject), rejected.reject.reason) for rejected in found.rejected]


def tables(row: Any, shape: RowShape, version: int | None) -> None:
    parsed(row, shape, version)


def files(content: bytes) -> None:
    """A whole file: every line that is not blank is a conversation or a problem with its number."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_bytes(content)
        if content:
            lines = [row.line for row in conversations(Source("s", path=str(path)))]
            given_lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert lines == [n for n, line in enumerate(given_lines, start=1) if line.strip()]


LINES = damaged() | st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode())
FUZZES: dict[str, tuple[Callable[..., None], dict[str, st.SearchStrategy[Any]]]] = {
    "lines": (lines_of, {"row": LINES, "torn": st.booleans()}),
    "json": (json_rows, {"row": mutated() | ROWS | JSON, "shape": SHAPES, "version": VERSIONS}),
    "tables": (tables, {"row": table_rows(), "shape": SHAPES, "version": VERSIONS}),
    "files": (files, {"content": st.lists(LINES | st.sampled_from((b"", b"\r", b" ")), max_size=6).map(b"\n".join)}),
}


@pytest.mark.parametrize("name", FUZZES)
def test_no_row_is_more_than_a_bad_row(name: str) -> None:
    """The same examples each time: some seconds."""
    check, strategies = FUZZES[name]
    quiet = settings(deadline=None, max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck))
    quiet(given(**strategies)(check))()


@pytest.mark.long
@pytest.mark.parametrize("name", FUZZES)
def test_no_row_is_more_than_a_bad_row_for_two_minutes(name: str) -> None:
    check, strategies = FUZZES[name]
    quiet = settings(deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck), database=None)
    fuzz = quiet(given(**strategies)(check))
    end = time.monotonic() + LONG_SECONDS / len(FUZZES)
    while time.monotonic() < end:  # other examples each time
        fuzz()


@pytest.mark.parametrize("number", range(len(SOUND)))
def test_the_rows_that_are_mutated_are_sound(number: int) -> None:
    row = SOUND[number]
    assert parsed(json.dumps(row).encode()).conversations
    assert parsed(copy.deepcopy(row)).conversations
