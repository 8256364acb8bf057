"""Reading: bytes in, conversations or exact rejects out, whatever a file looks like."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.settings import RowShape
from sftdist.data.rowfunction import load_row_function
from sftdist.data.schema import Conversation, Reject
from sftdist.data.sources import CHUNK_ROWS, Source, chunks, conversations, fingerprint, in_memory, parts_of

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LINE = json.dumps(ROW).encode()


def row(answer: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], **fields}


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read(path: object, **options: Any) -> list[Conversation | Reject]:
    paths = tuple(str(p) for p in path) if isinstance(path, list) else str(path)
    return list(conversations(Source("s", path=paths, **options)))


def from_bytes(tmp_path: Path, content: bytes) -> list[Conversation | Reject]:
    (tmp_path / "x.jsonl").write_bytes(content)
    return read(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (LINE + b"\n" + LINE + b"\n", [1, 2]),
        (LINE + b"\n" + LINE, [1, 2]),  # no line end at the end
        (b"\xef\xbb\xbf" + LINE + b"\n", [1]),  # byte order mark
        (LINE + b"\r\n" + LINE + b"\r\n", [1, 2]),  # CRLF
        (b"\n" + LINE + b"\n\n  \n\r\n" + LINE + b"\n\n", [2, 6]),  # blank lines count as lines
    ],
)
def test_forms_of_a_file_that_are_accepted(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    found = from_bytes(tmp_path, content)
    assert [(type(r), r.line) for r in found] == [(Conversation, line) for line in lines]


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b'{"messages": "\xff"}', "line: given byte 0xff at byte 15, required UTF-8 text", "invalid UTF-8"),
        (
            b'{"messages": [}',
            "line: given Expecting value at column 15, required one JSON object per line",
            "not JSON",
        ),
        (
            b"[",
            "line: given Expecting value at column 2 (a JSON array over many lines? convert it: jq -c '.[]'), "
            "required one JSON object per line",
            "not JSON",
        ),
        (
            b'{"id": "a", "messages": [], "id": "b"}',
            "id: given the key twice in one object, required each key once",
            "duplicate key",
        ),
        (
            b'{"messages": [{"role": "user", "role": "user", "content": "q"}]}',
            "role: given the key twice in one object, required each key once",
            "duplicate key",
        ),
        (b'{"a": NaN}', "line: given NaN, required a JSON number (NaN and Infinity are none)", "NaN or Infinity"),
        (b"12", "row: given 12, required a JSON object", "row is not an object"),
        (
            b'{"a": ' + b"1" * 5000 + b"}",
            "line: given a number of 5000 digits, required at most 1000",
            "number is too long",
        ),
        (b"[" * 100_000, "line: given JSON nested too deeply, required a row of messages", "nested too deeply"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: bytes, message: str, reason: str) -> None:
    before, found, after = from_bytes(tmp_path, LINE + b"\n" + line + b"\n" + LINE + b"\n")
    assert isinstance(before, Conversation)
    assert isinstance(after, Conversation)
    assert isinstance(found, Reject)
    assert (str(found), found.reason) == (f"x.jsonl:2: {message}", reason)


def test_a_last_line_that_was_cut_off(tmp_path: Path) -> None:
    _, found = from_bytes(tmp_path, LINE + b"\n" + LINE[:-20])
    assert isinstance(found, Reject)
    assert found.reason == "truncated last line"
    assert str(found).startswith("x.jsonl:2: line: given a last line that breaks off: ")
    # The same line in the middle of a file is no cut.
    _, found, _ = from_bytes(tmp_path, LINE + b"\n" + LINE[:-20] + b"\n" + LINE + b"\n")
    assert isinstance(found, Reject)
    assert found.reason == "not JSON"


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    found = read(write_lines(tmp_path / "x.jsonl", row("short"), row(text), row("after")))
    assert [len(r.messages[1].content) for r in found if isinstance(r, Conversation)] == [5, len(text), 5]


def test_no_type_is_inferred_from_earlier_rows(tmp_path: Path) -> None:
    """What kills Arrow's JSON reader: null then text, number then text, another structure in a later chunk."""
    rows = [row("a", meta=None, id=1), row("a", meta="text", id="two"), row("a", meta={"deep": [1, "x"]})]
    rows += [row("a", meta=3)] * (CHUNK_ROWS + 5)
    rows.append({"instruction": "q", "output": "a"})
    found = read(write_lines(tmp_path / "x.jsonl", *rows))
    assert all(isinstance(r, Conversation) for r in found)
    assert [r.id for r in found[:2]] == ["1", "two"]
    assert len(found) == len(rows)


def test_files_folders_globs_and_lists(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "d" / "a.jsonl", row("a"))
    b = write_lines(tmp_path / "d" / "deep" / "b.jsonl", row("b"), row("b2"))
    (tmp_path / "d" / "notes.txt").write_text("no rows")
    by_folder = [(r.file, r.line) for r in read(tmp_path / "d")]
    assert by_folder == [("a.jsonl", 1), ("deep/b.jsonl", 1), ("deep/b.jsonl", 2)]
    assert [(r.file, r.line) for r in read(f"{tmp_path}/d/**/*.jsonl")] == by_folder
    assert [r.file for r in read([b, a])] == ["deep/b.jsonl", "deep/b.jsonl", "a.jsonl"]
    assert [r.file for r in read(a)] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "data.train: given none.jsonl, which does not exist, required a file, folder, glob or hub:NAME"),
        ("*.nothing", "data.train: given glob *.nothing without matches, required at least one file"),
        (
            "folder",
            "data.train: given folder folder without matches, required files of .jsonl .json .ndjson .parquet in it",
        ),
        ("empty.jsonl", "empty.jsonl: given an empty file, required at least one row"),
        ((), "data.train: given nothing, required a file, folder, glob or hub:NAME"),
    ],
)
def test_input_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError) as caught:
        parts_of(Source("s", path=path))
    assert str(caught.value) == message


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(DataError) as caught:
        parts_of(Source("s", path=("no1.jsonl", str(tmp_path / "e.jsonl"), "no2.jsonl")))
    assert len(str(caught.value).splitlines()) == 3


# --- tables -----------------------------------------------------------------------------------------------


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}
OTHER_TOOL = {"type": "function", "function": {"name": "g", "parameters": {"b": {"type": "integer"}}}}


@pytest.fixture
def table() -> datasets.Dataset:
    """Arrow fills absent keys with null, inside tool schemas too."""
    return datasets.Dataset.from_list([row("one", tools=[TOOL]), row("two", tools=[OTHER_TOOL])])


def check_table(found: list[Conversation | Reject], file: str) -> None:
    assert all(isinstance(r, Conversation) for r in found), [str(r) for r in found]
    assert [(r.messages[1].content, r.tools[0], r.file, r.line) for r in found if isinstance(r, Conversation)] == [
        ("one", TOOL, file, 1),
        ("two", OTHER_TOOL, file, 2),
    ]


def test_parquet(tmp_path: Path, table: datasets.Dataset) -> None:
    path = tmp_path / "some [1] name.parquet"
    table.to_parquet(str(path))
    check_table(read(path), path.name)


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"x\.parquet: given a file that is not parquet"):
        read(tmp_path / "x.parquet")


def test_a_hub_dataset(tmp_path: Path, table: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mydata"
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    check_table(read(f"hub:{folder}"), "hub:mydata")
    with pytest.raises(DataError, match="required a dataset and split that load"):
        read(f"hub:{folder}", hub_split="nosuchsplit")
    with pytest.raises(DataError, match=r"data\.train: given hub:"):
        read(f"hub:{tmp_path}/nosuchfolder")


def test_rows_in_memory(table: datasets.Dataset) -> None:
    check_table(list(conversations(in_memory(table, "train", "dataset"))), "memory")
    generator: Iterator[dict[str, Any]] = (row(str(i)) for i in range(3))
    source = in_memory(generator, "train", "dataset")
    assert len(list(conversations(source))) == len(list(conversations(source))) == 3
    with pytest.raises(DataError, match=r"given a DatasetDict, required a datasets\.Dataset"):
        in_memory(datasets.DatasetDict(train=table), "train", "dataset")


# --- a user's row function ----------------------------------------------------------------------------------

FUNCTION = """
def rows(row):
    if row["kind"] == "skip":
        return None
    one = {"prompt": row["q"], "completion": row["a"]}
    return [one, one] if row["kind"] == "two" else one
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_row_function.py"
    file.write_text(FUNCTION)
    yield file
    sys.modules.pop("my_row_function", None)


def test_a_row_function_makes_rows(module: Path) -> None:
    kinds = ["one", "two", "skip", "one"]
    path = write_lines(module.parent / "x.jsonl", *({"kind": k, "q": "q", "a": "a"} for k in kinds), {"kind": "one"})
    found = read(path, row_function="my_row_function:rows")
    assert [(r.id, r.line) for r in found] == [
        ("x.jsonl:1", 1),
        ("x.jsonl:2.1", 2),
        ("x.jsonl:2.2", 2),
        ("x.jsonl:4", 4),
        ("x.jsonl:5", 5),
    ]
    assert str(found[-1]) == "x.jsonl:5: row: given KeyError: 'q', required a row that the row function accepts"
    source = Source("s", path=str(path), row_function="my_row_function:rows")
    before = fingerprint(source, parts_of(source))
    module.write_text(FUNCTION + "# a helper changed\n")
    assert fingerprint(source, parts_of(source)) != before


def test_what_a_row_function_uses_of_its_own_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_with_help.py").write_text(
        "from help_of_rows import clean\n\n\ndef rows(row):\n    return clean(row)\n"
    )
    monkeypatch.chdir(tmp_path)
    source = Source("s", rows=[], row_function="rows_with_help:rows")
    prints = []
    for text in ("row", "row or None"):
        (tmp_path / "help_of_rows.py").write_text(f"import json\n\n\ndef clean(row):\n    return {text}\n")
        for name in ("rows_with_help", "help_of_rows"):
            sys.modules.pop(name, None)
        load_row_function.cache_clear()
        importlib.invalidate_caches()
        prints.append(fingerprint(source, [])["row_function"]["sha256"])
    assert prints[0] != prints[1]


@pytest.mark.parametrize("path", ["my_row_function", "my_row_function:", "my_row_function:nothing", "no_such_mod:f"])
def test_a_row_function_that_is_none(module: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=f"row_function: given {path}, required"):
        fingerprint(Source("s", rows=[], row_function=path), [])


# --- what a store's key sees --------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    def of(folder: str, answer: str, **options: Any) -> dict[str, Any]:
        path = write_lines(tmp_path / folder / "x.jsonl", row(answer))
        source = Source("s", path=str(path), **options)
        return fingerprint(source, parts_of(source))

    assert of("here", "a") == of("there", "a")
    assert of("here", "a") != of("here", "b")
    assert of("here", "a") != of("here", "a", shape=RowShape.messages)


def test_chunks_bound_what_is_in_memory(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", *[row("a")] * (CHUNK_ROWS * 2 + 1), row("b" * 9_000_000), row("c"))
    sizes = [len(chunk.rows) for chunk in chunks(parts_of(Source("s", path=str(path))))]
    assert sizes == [CHUNK_ROWS, CHUNK_ROWS, 2, 1]


def test_a_byte_order_mark_in_the_middle_of_a_file_is_a_bad_row(tmp_path: Path) -> None:
    """As when two files were put together; alone in its line it is a row still, and no row is left out silently."""
    found = from_bytes(tmp_path, LINE + b"\n\xef\xbb\xbf\n\xef\xbb\xbf" + LINE + b"\n")
    assert [(type(r), r.line) for r in found] == [(Conversation, 1), (Reject, 2), (Reject, 3)]


def test_arrays_as_pandas_has_them_are_lists(tmp_path: Path) -> None:
    turns = np.empty(2, dtype=object)
    turns[:] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": np.float64(0.5)}]
    source = in_memory([{"messages": turns, "tags": np.array(["x", "y"]), "id": np.int64(7)}], "s", "dataset")
    (row,) = conversations(source)
    assert isinstance(row, Conversation)
    assert (row.id, row.tags, row.messages[1].weight) == ("7", ("x", "y"), 0.5)


def test_values_in_a_circle_are_a_bad_row() -> None:
    circle: dict[str, Any] = {"prompt": "q", "completion": "a"}
    circle["self"] = circle
    (row,) = conversations(in_memory([circle], "s", "dataset"))
    assert isinstance(row, Reject)
    assert row.reason == "nested too deeply"
