"""The quickstart's folder is complete, written once, and put right where it is not."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from sftdist.assets import desk
from sftdist.assets.quickstart import SCHEMA_FILE, ensure


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    ensure(folder)
    return folder


def test_the_folder_holds_sources_schema_and_base(folder: Path) -> None:
    names = set(_contents(folder))
    assert {"data/domain.jsonl", "data/general.jsonl", "data/format.jsonl", SCHEMA_FILE} < names
    assert {"base/model.safetensors", "base/config.json", "base/tokenizer.json", "base/generation_config.json"} < names
    assert json.loads((folder / SCHEMA_FILE).read_text()) == desk.SCHEMA
    for source in desk.ROWS:
        lines = (folder / f"data/{source}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == desk.rows(source)


def test_a_second_call_writes_nothing(folder: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ensure(folder) == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_a_torn_file_is_put_back(tmp_path: Path) -> None:
    ensure(tmp_path)
    before = _contents(tmp_path)
    torn = tmp_path / "data/domain.jsonl"
    torn.write_bytes(torn.read_bytes()[:1000])
    (tmp_path / SCHEMA_FILE).unlink()
    assert sorted(ensure(tmp_path)) == ["data/domain.jsonl", SCHEMA_FILE]
    assert _contents(tmp_path) == before


def test_processes_may_call_it_at_once(folder: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(ensure, [tmp_path] * 3))
    assert _contents(tmp_path) == _contents(folder)
