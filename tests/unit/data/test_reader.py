"""A user's reader: its rows, its source in the store's key, and what is said where it fails."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.errors import ConfigError, DataError
from sftdist.data.schema import Conversation
from sftdist.data.sources import CHUNK_ROWS, Source, conversations, fingerprint, parts_of, places, read_chunk

READER = """
def pairs(file):
    for line in file.read_text().splitlines():
        question, answer = line.split("|")
        yield {"prompt": question, "completion": answer}


def torn(file):
    yield {"prompt": "q", "completion": "a"}
    raise OSError("the end is missing")


def texts(file):
    return ["no mapping"]


def number(file):
    return 7


def nothing():
    return []
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own_reader.py"
    file.write_text(READER)
    yield file
    sys.modules.pop("own_reader", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.fixture
def source(module: Path) -> Callable[..., Source]:
    folder = module.parent / "rows"
    folder.mkdir()
    (folder / "one.psv").write_text("q1|a1\nq2|a2\n")
    (folder / "two.psv").write_text("q3|a3\nbroken\n")

    def made(path: str = "rows/one.psv", name: str = "pairs", **more: Any) -> Source:
        return Source("s", path=path, reader=f"own_reader:{name}", **more)

    return made


def answers(source: Source) -> list[str]:
    return [row.messages[-1].content for row in conversations(source) if isinstance(row, Conversation)]


def test_a_reader_gives_the_rows_of_any_file(source: Callable[..., Source]) -> None:
    assert answers(source()) == ["a1", "a2"]
    found = [row.id for row in conversations(source()) if isinstance(row, Conversation)]
    assert found == ["one.psv:1", "one.psv:2"]


def test_a_folder_is_all_of_its_files_and_the_chunks_hold_the_rows(source: Callable[..., Source]) -> None:
    rows = Path("rows")
    (rows / "two.psv").write_text("".join(f"q{i}|b{i}\n" for i in range(CHUNK_ROWS + 3)))
    (rows / ".hidden").write_text("not asked\n")
    parts = parts_of(source("rows"))
    assert [part.name for part in parts] == ["one.psv", "two.psv"]
    assert [len(read_chunk(place, parts).rows) for place in places(parts)] == [2, CHUNK_ROWS, 3]


def test_its_source_is_part_of_the_key_and_a_store_without_one_keeps_its_key(
    source: Callable[..., Source], module: Path
) -> None:
    def key() -> dict[str, Any]:
        one = source()
        return fingerprint(one, parts_of(one))

    before = key()
    assert before["reader"]["name"] == "own_reader:pairs"
    module.write_text(READER + "# edited\n")
    assert key() != before
    assert "reader" not in fingerprint(Source("s", path="rows/one.psv"), [])


@pytest.mark.parametrize(
    ("path", "name", "said"),
    [
        (
            "rows/two.psv",
            "pairs",
            r"rows/two.psv: reader: own_reader:pairs raised ValueError: not enough values .*after 1",
        ),
        ("rows/one.psv", "torn", r"raised OSError: the end is missing \(own_reader.py, line 10\) after 1 rows"),
        ("rows/one.psv", "texts", 'gave "no mapping" as row 1, required a mapping'),
        ("rows/one.psv", "number", "gave int, required rows"),
    ],
)
def test_a_reader_that_fails_is_named_with_its_file(
    source: Callable[..., Source], path: str, name: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        answers(source(path, name))


def test_a_reader_that_cannot_be_called(source: Callable[..., Source]) -> None:
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"reader: given own_reader:nothing, required a function \(file: Path\)"):
        answers(source(name="nothing"))
    absent = source(name="absent")
    with pytest.raises(ConfigError, match="reader: given own_reader:absent, required a name"):
        fingerprint(absent, parts_of(absent))
    with pytest.raises(DataError, match="given hub:x with a reader, which reads files"):
        parts_of(source("hub:x"))
