"""How far prepare is: said now and then, with the time left where the size of the work is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from sftdist.data.build import at_most_every, how_far
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.sources import CHUNK_ROWS, Source, in_memory
from sftdist.prepare import ticking
from tests.e2e.workshop import SPECIALS, rows, write_rows
from tests.terminal import Terminal
from tests.tokenizers import byte_tokenizer


def ticks(source: Source, folder: Path) -> list[str]:
    said: list[str] = []
    tokenizer = byte_tokenizer(specials=SPECIALS)
    request = PrepareRequest((SourceRequest(source),), folder / "stores", tokenizer=tokenizer, chat_template="chatml")
    prepare(request, tick=said.append)
    return said


def test_every_chunk_is_told_of_and_the_last_is_the_end(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "my.jsonl", 3 * CHUNK_ROWS)
    said = ticks(Source("mine", str(file)), tmp_path)
    shares = [int(text.rpartition("%")[0].rpartition(" ")[2]) for text in said]
    assert shares[0] in range(25, 40)
    assert shares == sorted(shares)
    assert said[-1].startswith(f"mine: {3 * CHUNK_ROWS:,} rows, ")
    assert said[-1].endswith(" 100%, left 0:00:00")


def test_rows_in_memory_have_no_size(tmp_path: Path) -> None:
    (said,) = ticks(in_memory(rows(20), "train", "dataset"), tmp_path)
    assert said.startswith("train: 20 rows, ")
    assert "%" not in said


@pytest.mark.parametrize(
    ("share", "end"),
    [(None, "50 rows/s"), (0.25, "50 rows/s, 25%, left 0:05:00"), (1.2, "50 rows/s, 100%, left 0:00:00")],
)
def test_the_time_left(share: float | None, end: str) -> None:
    assert how_far("mine", 5000, 100.0, share) == f"mine: 5,000 rows, {end}"


def test_lines_come_now_and_then_and_not_for_what_is_quick() -> None:
    said: list[str] = []
    now = 100.0
    tick = at_most_every(5.0, said.append, clock=lambda: now)
    for now in (101.0, 104.0, 105.0, 106.0, 109.9, 111.0):
        tick(str(now))
    assert said == ["105.0", "111.0"]


def test_one_line_on_a_terminal_that_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sftdist.prepare.REFRESH_SECONDS", 0.0)
    with Terminal(80) as terminal:
        console = Console(file=terminal.text())
        with ticking(console) as tick:
            assert tick is not None
            for number in range(3):
                tick(f"mine: {number} rows, {'9' * 100}")
            console.print("a message")
        console.file.close()
        picture = terminal.close()
    assert "mine: 2 rows" in terminal.output
    assert [line for line in picture.lines if line] == ["a message"]
    assert picture.cursor
    with ticking(Console(force_terminal=False)) as tick:
        assert tick is None
