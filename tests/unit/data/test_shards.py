"""Shards: what is written is what is read, nothing else is taken for one, and a killed prepare goes on from them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sftdist.core.errors import DataError, WorkerLostError
from sftdist.core.storage import read_json, read_jsonl, verify_directory
from sftdist.data.encode import Job, Shard, encode_chunk, joined
from sftdist.data.mask import MaskOptions
from sftdist.data.near import Near
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.shards import SHARD_CHUNKS, StoredShard, Work, is_there, make_shard, save, works
from sftdist.data.sources import CHUNK_ROWS, Source, parts_of, places, read_chunk
from sftdist.data.store import TokenStore
from sftdist.data.template import ChatTemplate
from sftdist.data.vocabulary import train_tokenizer

SHARD_ROWS = SHARD_CHUNKS * CHUNK_ROWS
ROWS = 2 * SHARD_ROWS + CHUNK_ROWS  # three shards
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([f"question {i} answer {i} system user assistant" for i in range(200)], 320)


def row(number: int, **fields: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
    return {"id": f"r{number}", "messages": said, **fields}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def job_of(path: Path, tokenizer: PreTrainedTokenizerFast) -> Job:
    source = Source("train", str(path))
    template = ChatTemplate.of(tokenizer, "chatml")
    near = Near(0.8, 3)
    return Job(source, tuple(parts_of(source)), template, MaskOptions(), near=near, validation=0.2, holdout=0.2)


def assert_same(one: Shard, other: Shard) -> None:
    assert (one.read, one.left_out, one.size, one.bad) == (other.read, other.left_out, other.size, other.bad)
    assert (one.refused, one.row_ids, one.label_names) == (other.refused, other.row_ids, other.label_names)
    assert one.samples.names == other.samples.names
    assert (one.rules, one.findings) == (other.rules, other.findings)
    for mine, its in zip(arrays_of(asdict(one)), arrays_of(asdict(other)), strict=True):
        np.testing.assert_array_equal(mine, its)


def arrays_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [array for item in value.values() for array in arrays_of(item)]
    return [value] if isinstance(value, np.ndarray) else []


# --- one shard ------------------------------------------------------------------------------------------------


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    odd = row(7, id="zwölf\n日本", tags=["a", "b"], label_origin="human")
    odd["messages"][1]["weight"] = 0.25
    refused = {"id": "r", "prompt": "q", "completion": "stop <|im_end|> here"}
    path = write(tmp_path / "x.jsonl", [*(row(i) for i in range(CHUNK_ROWS)), "{broken", odd, refused, row(9)])
    job = job_of(path, tokenizer)
    shard = joined([encode_chunk(job, read_chunk(place, job.parts)) for place in places(job.parts)])
    assert (shard.read, shard.rows, len(shard.bad), len(shard.refused)) == (CHUNK_ROWS + 4, CHUNK_ROWS + 3, 1, 1)
    save(shard, tmp_path / "s.npz", {})
    stored = StoredShard.open(tmp_path / "s.npz")
    assert_same(stored.load(), shard)
    assert (stored.rows, stored.read, stored.row_ids) == (shard.rows, shard.read, shard.row_ids)
    np.testing.assert_array_equal(stored.columns.prompts, shard.columns.prompts)
    assert shard.label_names == [((), None), (("a", "b"), "human")]
    assert np.isin(0.25, shard.samples.weights)
    assert [f.name for f in tmp_path.glob("s*")] == ["s.npz"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path, place: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(b'"header"') if place is None else place] ^= 1
    file.write_bytes(data)


def another_archive(file: Path) -> None:
    np.savez(file.open("wb"), text=np.zeros(3, dtype=np.uint8))


@pytest.mark.parametrize("damage", [cut, emptied, flipped, another_archive, Path.unlink])
def test_what_is_no_whole_shard_is_not_taken_for_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, damage: Callable[[Path], Any]
) -> None:
    job = job_of(write(tmp_path / "x.jsonl", [row(i) for i in range(9)]), tokenizer)
    (work,) = works(0, places(job.parts), tmp_path)
    make_shard(job, work)
    assert is_there(work)
    damage(work.file)
    assert not is_there(work)


def test_no_flipped_bit_gets_into_a_store(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    job = job_of(write(tmp_path / "x.jsonl", [row(i) for i in range(9)]), tokenizer)
    (work,) = works(0, places(job.parts), tmp_path)
    make_shard(job, work)
    sound = work.file.read_bytes()
    for place in np.random.default_rng(0).integers(len(sound), size=60).tolist():
        work.file.write_bytes(sound)
        flipped(work.file, place)
        assert not is_there(work)


def test_the_shard_of_another_place_is_not_taken_for_this_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number, another store, other code, and the same lines of a file that has been written again."""
    job = job_of(write(tmp_path / "x.jsonl", [row(i) for i in range(SHARD_ROWS + 9)]), tokenizer)
    first, second = works(0, places(job.parts), tmp_path)
    make_shard(job, second)
    shutil.copy(second.file, first.file)
    assert is_there(second)
    assert not is_there(first)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(second.file, elsewhere)
    assert not is_there(replace(second, file=elsewhere / second.file.name))
    with monkeypatch.context() as changed:
        changed.setattr("sftdist.data.shards.code_digest", lambda: "another")
        assert not is_there(second)
    assert is_there(second)
    write(tmp_path / "x.jsonl", [row(i) for i in reversed(range(SHARD_ROWS + 9))])
    assert [p.end for p in places(job.parts)][-1] == second.places[-1].end
    assert not any(is_there(work) for work in works(0, places(job.parts), tmp_path))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    job = job_of(write(tmp_path / "x.jsonl", [row(i) for i in range(9)]), tokenizer)
    (work,) = works(0, places(job.parts), tmp_path)
    write(tmp_path / "x.jsonl", [row(i) for i in reversed(range(9))])
    with pytest.raises(DataError, match=r"x\.jsonl: given a file that changed while it was read"):
        make_shard(job, work)


# --- killed, and started again --------------------------------------------------------------------------------


@pytest.fixture
def request_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., PrepareRequest]:
    def make(stores: str = "stores", rows: int = ROWS, workers: int = 1) -> PrepareRequest:
        path = tmp_path / "x.jsonl"
        if not path.exists():
            write(path, [row(i % (rows - 50)) for i in range(rows)])
        entry = SourceRequest(Source("train", str(path)))
        return PrepareRequest((entry,), tmp_path / stores, tokenizer=tokenizer, chat_template="chatml", workers=workers)

    return make


def prepare_and_die(request: PrepareRequest, ticks: int) -> None:
    left = ticks

    def tick(_: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(request, tick=tick)


def killed_after(request: PrepareRequest, ticks: int) -> Path:
    """The folder that a prepare leaves which is killed when so many shards are there."""
    process = fork.Process(target=prepare_and_die, args=(request, ticks))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (folder,) = request.store_dir.glob(".train-*.work")
    return folder


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.glob("*.npz")}


def manifest_of(request: PrepareRequest) -> Any:
    (folder,) = request.store_dir.glob("train-*")
    assert verify_directory(folder) == []
    assert [path.name for path in request.store_dir.glob(".*")] == []
    return read_json(folder / "manifest.json")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_prepare_goes_on_from_its_shards(request_of: Callable[..., PrepareRequest], workers: int) -> None:
    request = request_of(workers=workers)
    folder = killed_after(request, 2)
    before = states(folder)
    assert len(before) >= 2
    (folder / "000003.123.tmp").write_text("torn")
    seen: list[dict[str, tuple[int, int]]] = []
    prepare(request, tick=lambda _: seen.append(states(folder)))
    assert len(seen) == 3
    assert {name: seen[-1][name] for name in before} == before, "what was there is not made again"
    undisturbed = request_of("others")
    prepare(undisturbed)
    assert manifest_of(request) == manifest_of(undisturbed)


def test_a_damaged_shard_is_made_again(request_of: Callable[..., PrepareRequest]) -> None:
    request = request_of()
    folder = killed_after(request, 3)
    before = states(folder)
    flipped(folder / "000001.npz")
    shutil.copy(folder / "000000.npz", folder / "000002.npz")
    seen: list[dict[str, tuple[int, int]]] = []
    prepare(request, tick=lambda _: seen.append(states(folder)))
    again = {name for name in before if seen[-1][name] != before[name]}
    assert again == {"000001.npz", "000002.npz"}
    undisturbed = request_of("others")
    prepare(undisturbed)
    assert manifest_of(request) == manifest_of(undisturbed)


DEADLY = """
import os, signal
def rows(row):
    if row["id"] == "r3000":
        os.kill(os.getpid(), signal.SIGKILL)
    return row
"""


def test_a_killed_worker_ends_prepare_with_a_clear_error(
    request_of: Callable[..., PrepareRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_rows.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    request = request_of(workers=2)
    source = replace(request.sources[0].source, row_function="deadly_rows:rows")
    with pytest.raises(WorkerLostError) as caught:
        prepare(replace(request, sources=(SourceRequest(source),)))
    assert "given" not in str(caught.value)
    assert "give fewer with data.workers" in str(caught.value)
    assert list(request.store_dir.glob("train-*")) == []


def test_who_waits_says_so_and_takes_over_from_a_killed_one(request_of: Callable[..., PrepareRequest]) -> None:
    request = request_of()
    stopped = fork.Process(target=prepare_and_stop, args=(request,))
    stopped.start()
    assert stopped.pid is not None
    os.waitpid(stopped.pid, os.WUNTRACED)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        os.kill(stopped.pid or 0, signal.SIGKILL)

    store = prepare(request, say).stores["train"]
    assert said[0].startswith(f"train: waiting for process {stopped.pid} on ")
    assert len(store) == ROWS - 50
    manifest_of(request)
    stopped.join()


def prepare_and_stop(request: PrepareRequest) -> None:
    prepare(request, tick=lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def test_what_is_dropped_is_listed_with_its_twin(request_of: Callable[..., PrepareRequest]) -> None:
    store = prepare(request_of()).stores["train"]
    dropped = list(read_jsonl(store.path / "dropped.jsonl"))
    assert [(d["id"], d["twin"], d["line"]) for d in dropped] == [
        (f"r{i}", f"r{i}", ROWS - 49 + i) for i in range(50)
    ], "the twin of each is its first copy, in another shard"
    assert {(d["stage"], d["file"]) for d in dropped} == {("duplicate", "x.jsonl")}
    assert TokenStore.open(store.path).manifest["counts"]["duplicate"]["rows"] == 50


def test_works_are_made_of_a_few_chunks(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(i) for i in range(SHARD_ROWS + CHUNK_ROWS + 1)])
    found: list[Work] = list(works(0, places(parts_of(Source("s", str(path)))), tmp_path))
    assert [sum(place.count for place in work.places) for work in found] == [SHARD_ROWS, CHUNK_ROWS + 1]
    assert [work.file.name for work in found] == ["000000.npz", "000001.npz"]
