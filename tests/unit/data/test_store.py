"""The token store: what is written is what is read, in the smallest type, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdist.core.errors import DataError
from sftdist.core.storage import read_json, verify_directory, write_json
from sftdist.data.keys import DIGEST_BYTES
from sftdist.data.store import Block, StoreFigures, TokenStore, ids_dtype, write_store


def block(rows: list[tuple[str, list[int], list[float], int]], line: int = 1, near: bool = False) -> Block:
    return Block(
        ids=np.concatenate([np.array(ids, dtype=np.int32) for _, ids, _, _ in rows]),
        weights=np.concatenate([np.array(weights, dtype=np.float32) for _, _, weights, _ in rows]),
        lengths=np.array([len(ids) for _, ids, _, _ in rows], dtype=np.int32),
        split=np.array([split for _, _, _, split in rows], dtype=np.uint8),
        files=np.zeros(len(rows), dtype=np.int64),
        lines=np.arange(line, line + len(rows), dtype=np.int64),
        row_ids=[name for name, _, _, _ in rows],
        contents=np.array([[(line + i) % 256] * DIGEST_BYTES for i in range(len(rows))], dtype=np.uint8),
        prompts=np.array([[(100 + line + i) % 256] * DIGEST_BYTES for i in range(len(rows))], dtype=np.uint8),
        labels=np.arange(line, line + len(rows), dtype=np.uint32),
        signatures=np.full((len(rows), 2, 128), line + np.arange(len(rows))[:, None, None], dtype=np.uint16)
        if near
        else None,
    )


ROWS: list[tuple[str, list[int], list[float], int]] = [
    ("a", [5, 6, 7], [0, 0, 1], 0),
    ("zwölf-日本", [5, 9, 9, 2], [0, 1, 0.5, 0], 1),
    ("", [1, 2], [0, 1], 2),
    ("d", [3, 4, 5, 6, 7], [0, 0, 0.1, 0.5, 1], 0),
]


def write(path: Path, blocks: list[Block], vocabulary: int = 100, **meta: Any) -> TokenStore:
    def describe(figures: StoreFigures) -> dict[str, Any]:
        return {"key": "k", "files": ["x.jsonl"], "stop_share": figures.stop_share([7, 9, 2]), **meta}

    return write_store(path, lambda _: blocks, name="s", vocabulary=vocabulary, describe=describe)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [block(ROWS[:2]), block(ROWS[2:], line=3)])
    assert len(store) == 4
    for row, (name, ids, weights, split) in enumerate(ROWS):
        got_ids, got_weights = store.tokens(row)
        assert got_ids.tolist() == ids
        assert got_ids.dtype == np.int32
        np.testing.assert_array_equal(got_weights, np.array(weights, dtype=np.float32))
        assert store.targets[row] == pytest.approx(sum(weights))
        assert store.split[row] == split
        assert store.row_ids([row]) == [name]
        assert store.origin(row) == ("x.jsonl", row + 1)
    assert store.offsets.tolist() == [0, 3, 7, 9, 14]
    assert store.lengths.tolist() == [3, 4, 2, 5]
    assert store.row_ids(np.array([3, 0])) == ["d", "a"]
    assert store.contents.tolist() == [[row] * DIGEST_BYTES for row in (1, 2, 3, 4)]
    assert store.prompts.tolist() == [[100 + row] * DIGEST_BYTES for row in (1, 2, 3, 4)]
    assert store.labels.tolist() == [1, 2, 3, 4]
    assert store.signatures is None


def test_signatures_are_a_column_where_there_are_any(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [block(ROWS[:2], near=True), block(ROWS[2:], line=3, near=True)])
    assert store.signatures is not None
    assert (store.signatures.shape, store.signatures.dtype) == ((4, 2, 128), np.uint16)
    assert store.signatures[:, 1, 5].tolist() == [1, 2, 3, 4]


def test_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    manifest = write(tmp_path / "s", [block(ROWS)]).manifest
    assert manifest["largest_id"] == 9
    assert manifest["splits"]["train"]["rows"] == 2
    assert manifest["splits"]["train"]["tokens"] == 8
    assert manifest["splits"]["train"]["targets"] == pytest.approx(2.6)
    assert manifest["splits"]["holdout"] == {"rows": 1, "tokens": 2, "targets": 1.0}
    assert manifest["stop_share"] == 1.0  # the last supervised tokens are 7, 9 (not 2: weight 0), 2 and 7


def test_the_stop_share_looks_at_the_last_supervised_token(tmp_path: Path) -> None:
    figures: list[StoreFigures] = []
    write_store(
        tmp_path / "s",
        lambda _: [block(ROWS)],
        name="s",
        vocabulary=100,
        describe=lambda f: figures.append(f) or {"files": []},  # type: ignore[func-returns-value]
    )
    assert figures[0].stop_share([7]) == 0.5
    assert figures[0].stop_share([7, 9]) == 0.75


def test_bytes_do_not_depend_on_the_blocks(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [block(ROWS)]).path
    two = write(tmp_path / "two", [block(ROWS[:1]), block(ROWS[1:], line=2)]).path
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("vocabulary", "kind", "largest"), [(65_535, "<u2", 65_534), (65_536, "<u4", 65_535), (200_000, "<u4", 199_999)]
)
def test_ids_take_the_smallest_type_that_holds_them(tmp_path: Path, vocabulary: int, kind: str, largest: int) -> None:
    store = write(tmp_path / "s", [block([("a", [0, largest], [0, 1], 0)])], vocabulary=vocabulary)
    assert ids_dtype(vocabulary) == store.manifest["ids_dtype"] == kind
    assert store.tokens(0)[0].tolist() == [0, largest]


def test_a_published_store_verifies_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [block(ROWS)])
    assert verify_directory(store.path) == []
    ids = store.path / "ids.bin"
    ids.write_bytes(ids.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"ids\.bin: given 26 bytes, required 28 bytes"):
        TokenStore.open(store.path)
    ids.unlink()
    with pytest.raises(DataError, match="given no such file"):
        TokenStore.open(store.path)


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [block(ROWS)])
    write_json(store.path / "store.json", {**read_json(store.path / "store.json"), "format": 99})
    with pytest.raises(DataError, match="given a store of format 99, required format 3"):
        TokenStore.open(store.path)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def blocks(folder: Path) -> Any:
        yield block(ROWS)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_store(tmp_path / "s", blocks, name="s", vocabulary=9, describe=lambda _: {})
    assert list(tmp_path.iterdir()) == []


def test_too_many_weights_are_refused(tmp_path: Path) -> None:
    rows = [(str(i), [1, 2], [0.0, 2.0 + i], 0) for i in range(255)]
    with pytest.raises(DataError, match="at most 256 different weights"):
        write(tmp_path / "s", [block(rows)])
    assert write(tmp_path / "t", [block(rows[:254])]).tokens(253)[1].tolist() == [0.0, 255.0]


def test_an_empty_store_opens(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [])
    assert len(store) == 0
    assert store.ids.size == 0
