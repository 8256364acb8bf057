"""The prepare command as a user meets it: exit codes, files, simultaneous starts, bounded memory, real data."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from sftdist.core import config
from sftdist.core.config import compose
from sftdist.core.errors import DataError
from sftdist.core.settings import PrepareConfig, TrainConfig
from sftdist.core.storage import read_json, verify_directory
from sftdist.data.near import Near
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.request import SMALL_ROWS, prepare_small, request_of
from sftdist.data.sources import Source
from sftdist.data.store import TokenStore
from sftdist.data.vocabulary import train_tokenizer
from sftdist.prepare import command
from tests.ranks import context

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"question {i} answer {i} system user assistant" for i in range(200)], 320).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, *more: str) -> Path:
    rows = ({"id": f"r{i}", "prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "".join(f"{line}\n" for line in more))
    return path


def run_here(*overrides: str) -> int:
    """The command line in this process: an import of torch cheaper than a process of its own."""
    return config.main(PrepareConfig, command, "prepare", ["+exp=full", *overrides])


def test_the_command_line(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my.jsonl", 30, "{broken", '{"prompt": "q", "completion": "a <|im_end|> b"}')
    given = ["data.train=my.jsonl", f"model.path={tokenizer_folder}", "model.chat_template=chatml"]
    words = [sys.executable, "-m", "sftdist.prepare", "+exp=full", *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert refused.returncode == 3, refused.stderr
    assert "my.jsonl:31: line: given Expecting property name" in refused.stderr
    overrides = refused.stderr.strip().splitlines()[-1]
    assert overrides == "data.max_bad_rows=1 data.max_refused=1"
    assert (tmp_path / "stores" / "bad_rows.jsonl").read_text().count("\n") == 2

    assert run_here(*given, *overrides.split()) == 0
    assert "The whole report: stores/report.html" in capsys.readouterr().out
    report = read_json(tmp_path / "stores" / "report.json")
    assert {"text": "answer 0<|im_end|>", "weight": 1.0} in report["conversations"][0]["runs"]
    store = TokenStore.open(tmp_path / report["sources"]["train"]["store"])
    assert len(store) == 30
    assert verify_directory(store.path) == []


def test_a_dry_run_and_missing_data_write_nothing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["data.train=my.jsonl", f"model.path={tokenizer_folder}", "model.chat_template=chatml"]
    assert run_here(*given) == 3
    missing = "data.train: given my.jsonl, which does not exist"
    assert missing in capsys.readouterr().err
    assert run_here(*given, "dry_run=true") == 0
    assert missing in capsys.readouterr().out
    write_rows(tmp_path / "my.jsonl", 30)
    assert run_here(*given, "dry_run=true") == 0
    assert "to tokenise: train, 30 rows" in capsys.readouterr().out
    assert not (tmp_path / "stores").exists()


def request_of_rows(tmp_path: Path, tokenizer_folder: Path, rows: Path, workers: int = 1) -> PrepareRequest:
    return PrepareRequest(
        sources=(SourceRequest(Source("train", path=str(rows))),),
        store_dir=tmp_path / "stores",
        tokenizer=str(tokenizer_folder),
        chat_template="chatml",
        workers=workers,
    )


def test_eight_simultaneous_starts_give_one_valid_store(tmp_path: Path, tokenizer_folder: Path) -> None:
    request = request_of_rows(tmp_path, tokenizer_folder, write_rows(tmp_path / "x.jsonl", 3000))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=(request,)) for _ in range(8)]
    for process in processes:
        process.start()
    wait_for(lambda: working(tmp_path, processes) != [])
    (victim,) = working(tmp_path, processes)
    victim.kill()
    for process in processes:
        process.join()
    expected = [-signal.SIGKILL if process is victim else 0 for process in processes]
    assert [process.exitcode for process in processes] == expected
    stores = list(request.store_dir.glob("train-*"))
    assert len(stores) == 1
    assert verify_directory(stores[0]) == []
    assert prepare(request).report["sources"]["train"]["reused"]
    assert list(request.store_dir.glob(".*")) == [], "what the killed one left, which is as large as a store"


def test_where_there_are_no_locks_all_work_and_one_store_is_published(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some network file systems every lock is refused."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refused)
    request = request_of_rows(tmp_path, tokenizer_folder, write_rows(tmp_path / "x.jsonl", 2600))
    processes = [multiprocessing.get_context("fork").Process(target=prepare, args=(request,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    (store,) = request.store_dir.glob("train-*")
    assert verify_directory(store) == []
    monkeypatch.undo()
    undisturbed = prepare(replace(request, store_dir=tmp_path / "others")).stores["train"].path
    assert (store / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_again_and_again(tmp_path: Path, tokenizer_folder: Path, seed: int) -> None:
    """The bytes are those of an undisturbed prepare, and each start does some of the work for good."""
    rows = write_rows(tmp_path / "x.jsonl", 20_000)
    request = replace(request_of_rows(tmp_path, tokenizer_folder, rows, workers=2), near=Near(0.8, 3))
    began = time.monotonic()
    undisturbed = prepare(replace(request, store_dir=tmp_path / "others")).stores["train"].path
    whole = time.monotonic() - began
    moments = random.Random(seed)
    for _ in range(100):
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(request,))
        process.start()
        process.join(timeout=moments.uniform(0.2, 0.6) * whole)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == 0:
            break
    (store,) = request.store_dir.glob("train-*")
    assert (store / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    assert verify_directory(store) == []
    assert list(request.store_dir.glob(".*")) == []


def working(folder: Path, processes: Sequence[BaseProcess]) -> list[BaseProcess]:
    """The one that makes the store: the others wait for its lock."""
    signed = "".join(file.read_text() for file in (folder / "stores").glob(".train-*.work/lock"))
    return [process for process in processes if signed.startswith(f"process {process.pid} ")]


def prepare_as_a_user_does(folder: Path) -> None:
    """The whole command of one user, in a process of its own."""
    os.chdir(folder)
    shape = "model.shape={model_type:llama,hidden_size:8,num_hidden_layers:1,num_attention_heads:1,vocab_size:320}"
    own = ["data.train=x.jsonl", "model.init=random", shape, "model.vocabulary=320", "model.chat_template=chatml"]
    sys.exit(run_here(*own, "data.workers=1"))


def busy(folder: Path, processes: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Those that are in the middle of a tokenizer or a store."""
    names = [path.name for path in (folder / "stores").glob(".*.tmp")]
    writing = [process for process in processes if any(f"@{process.pid}@" in name for name in names)]
    return writing or working(folder, processes)


def test_eight_simultaneous_commands_of_which_one_is_killed(tmp_path: Path) -> None:
    """Tokenizer, store and report: none has a lock that outlives a killed process."""
    write_rows(tmp_path / "x.jsonl", 1000)
    processes = [context.Process(target=prepare_as_a_user_does, args=(tmp_path,)) for _ in range(8)]
    for process in processes:
        process.start()
    wait_for(lambda: busy(tmp_path, processes) != [])
    victim = busy(tmp_path, processes)[0]
    victim.kill()
    for process in processes:
        process.join()
    expected = [-signal.SIGKILL if process is victim else 0 for process in processes]
    assert [process.exitcode for process in processes] == expected
    again = context.Process(target=prepare_as_a_user_does, args=(tmp_path,))
    again.start()
    again.join()
    assert again.exitcode == 0
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "stores").iterdir())
    left = ["data", "leaks", "report.html", "report.json", "tokenizer", "train"]
    assert names == left, "data is data-manifest.json"
    for folder in (tmp_path / "stores").glob("t*-*"):
        assert verify_directory(folder) == []


def test_a_damaged_store_is_written_again_by_whoever_comes_first(tmp_path: Path, tokenizer_folder: Path) -> None:
    request = request_of_rows(tmp_path, tokenizer_folder, write_rows(tmp_path / "x.jsonl", 500))
    store = prepare(request).stores["train"].path
    (store / "ids.bin").write_bytes(b"")
    processes = [context.Process(target=prepare, args=(request,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert verify_directory(store) == []


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def test_a_training_job_prepares_small_data_only(tmp_path: Path, tokenizer_folder: Path) -> None:
    small = request_of_rows(tmp_path, tokenizer_folder, write_rows(tmp_path / "small.jsonl", 20))
    words = "sftdist prepare +exp=full data.train=x.jsonl"
    assert len(prepare_small(small, words, print).stores["train"]) == 20
    large = request_of_rows(tmp_path, tokenizer_folder, write_rows(tmp_path / "large.jsonl", SMALL_ROWS))
    with pytest.raises(DataError) as caught:
        prepare_small(large, words, print)
    assert str(caught.value).splitlines()[-1] == words
    assert len(list((tmp_path / "stores").glob("train-*"))) == 1


def test_the_settings_reach_the_request(tmp_path: Path) -> None:
    cfg: TrainConfig = compose(
        "lora",
        [
            "model.path=some/model",
            "data.train=[a.jsonl,b.jsonl]",
            "data.val=v.jsonl",
            "data.holdout=h.jsonl",
            "data.train_on=last",
            "data.workers=3",
            "data.max_refused=5",
            f"data.store_dir={tmp_path}",
        ],
    )
    request = request_of(cfg.data, cfg.model)
    assert request.sources[0].source == Source("train", path=("a.jsonl", "b.jsonl"), key="data.train")
    assert request.validation is not None
    assert request.holdout is not None
    assert (request.validation.source.name, request.validation.source.path) == ("validation", ("v.jsonl",))
    assert (request.holdout.source.key, request.holdout.mask.train_on) == ("data.holdout", "last")
    assert (request.tokenizer, request.workers, request.max_refused) == ("some/model", 3, 5)
    memory = request_of(cfg.data, cfg.model, dataset=[{"prompt": "q", "completion": "a"}])
    assert memory.sources[0].source.rows == [{"prompt": "q", "completion": "a"}]


@pytest.mark.long
def test_memory_does_not_grow_with_the_input(tmp_path: Path, tokenizer_folder: Path) -> None:
    """150,000 rows of about 100 tokens; their rows and arrays in memory would take several hundred megabytes."""
    prepare(request_of_rows(tmp_path, tokenizer_folder, write_rows(tmp_path / "warm.jsonl", 5000), workers=2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (tmp_path / "x.jsonl").open("w") as file:
        for i in range(150_000):
            file.write(json.dumps({"prompt": f"question {i} " * 8, "completion": f"answer {i} " * 8}) + "\n")
    store = prepare(request_of_rows(tmp_path, tokenizer_folder, tmp_path / "x.jsonl", workers=2)).stores["train"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert len(store) == 150_000
    assert grown < 150_000, f"{grown} KiB"


@pytest.mark.long
def test_real_data(shared_data: Path, tmp_path: Path) -> None:
    cfg: TrainConfig = compose("chat_small", [f"data.dir={shared_data}", f"data.store_dir={tmp_path}/stores"])
    prepared = prepare(request_of(cfg.data, cfg.model))
    rows = {name: len(store) for name, store in prepared.stores.items()}
    assert rows == {"domain": 6759, "general": 5831, "format": 6899}
    for store in prepared.stores.values():
        assert store.manifest["stop_share"] == 1.0
        assert store.ids.dtype.itemsize == 2
        assert 0.2 < store.targets.sum() / len(store.ids) < 0.7
