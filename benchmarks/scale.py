"""A million synthetic conversations through `sftdist prepare`: rows per second, memory, and what a kill costs.

    python -m benchmarks.scale [--rows 1000000] [--workers 2] [--folder DIR]

The conversations are made by a seeded script: words of a Zipf-like vocabulary of 60,000 made-up words, prompt and
answer of about 200 tokens together, one in eight with letters beyond ASCII, one in fifty an edited copy of the row
before it. The tokenizer is a byte-level BPE of 16,384 entries trained on a sample of them. Each prepare is the real
command in a process of its own; the resident memory of it and of each of its workers is what the kernel says was their
highest. Rows per second are all rows over the whole command, its start included; rows per CPU second, of all processes
together, are the steadier figure on a machine that others use. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import GIB, Result, command, load
from sftdist.data.shards import SHARD_CHUNKS
from sftdist.data.sources import CHUNK_ROWS
from sftdist.data.vocabulary import train_tokenizer

WORDS = 60_000
VOCABULARY = 16_384
TOKENIZER_ROWS = 20_000
BLOCK = 10_000  # rows that are made at a time
FAR = "äöüéèñçøåßłşğžČЖдиклмнπλσ你好世界学習日本語한국어مرحباहिन्दी🙂🚀"
OFF = ("data.near.duplicates=off", "data.leaks=off")
NEW_ROWS = 1_000
SHARD_ROWS = SHARD_CHUNKS * CHUNK_ROWS


# The conversations ---------------------------------------------------------------------------------------------------


def conversations(rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Seeded rows in the `messages` shape."""
    generator = np.random.default_rng(seed)
    words = _words(np.random.default_rng(1))
    weights = 1.0 / np.arange(3, WORDS + 3) ** 1.05
    order = weights.cumsum() / weights.sum()
    before: dict[str, Any] | None = None
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        lengths = np.clip(generator.lognormal(0, 0.5, (count, 2)) * (42, 97), 4, 2000).astype(int)
        drawn = iter(np.searchsorted(order, generator.random(int(lengths.sum()))).tolist())
        copied, far = generator.random(count) < 0.02, generator.random(count) < 0.125
        for i in range(count):
            prompt, answer = (_text(words, drawn, int(length)) for length in lengths[i])
            if far[i]:
                answer += f" {FAR[i % len(FAR)]}{FAR[(7 * i) % len(FAR)]} " + FAR[: 1 + i % 20]
            if copied[i] and before is not None:
                prompt, answer = (message["content"] for message in before["messages"])
                answer = f"{answer} {words[i % WORDS]}"
            before = {
                "id": f"row-{seed}-{start + i}",
                "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            }
            yield before


def _words(generator: np.random.Generator) -> list[str]:
    begin = ["b", "br", "c", "d", "f", "g", "h", "l", "m", "n", "p", "pr", "qu", "r", "s", "st", "t", "tr", "v", "w"]
    middle, end = "aeiou", ["l", "m", "n", "r", "s", "t", "nd", "st"]
    made: dict[str, None] = {}
    while len(made) < WORDS:
        syllables = int(generator.integers(1, 5))
        parts = (
            begin[generator.integers(len(begin))]
            + middle[generator.integers(len(middle))]
            + end[generator.integers(len(end))] * int(generator.integers(2))
            for _ in range(syllables)
        )
        made["".join(parts)] = None
    return sorted(made, key=len)


def _text(words: list[str], drawn: Iterator[int], length: int) -> str:
    said = [words[next(drawn)] for _ in range(length)]
    for place in range(12, length, 13):
        said[place] += ".\n\n" if place % 5 == 0 else "."
    return " ".join(said).capitalize() + "."


def write_rows(path: Path, rows: int, seed: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in conversations(rows, seed):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_tokenizer(folder: Path) -> None:
    texts = (m["content"] for row in conversations(TOKENIZER_ROWS, seed=0) for m in row["messages"])
    train_tokenizer(texts, VOCABULARY).save_pretrained(str(folder))


# One prepare ---------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """How a prepare went: exit code, seconds, those of CPU time of all of its processes together, and the highest
    resident memory of each of them in bytes."""

    code: int
    seconds: float
    cpu: float = 0.0
    peaks: dict[int, int] = field(default_factory=dict)

    @property
    def largest_gib(self) -> float:
        return max(self.peaks.values()) / GIB


def run(place: Path, stores: str, *more: str, kill_at: int | None = None) -> Prepared:
    """`sftdist prepare` on the rows of `place`; SIGKILL to it where `kill_at` shards are there."""
    words = [
        *("+exp=full", f"model.tokenizer={place / 'tokenizer'}", "model.path=none", "model.chat_template=chatml"),
        *(f"data.train={place / 'rows.jsonl'}", f"data.store_dir={place / stores}", *more),
    ]
    found, began, spent = Prepared(0, 0.0), time.monotonic(), _cpu()
    process = psutil.Popen(
        [sys.executable, "-m", "sftdist.cli", "prepare", *words], cwd=place, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        _look(process, found.peaks)
        if kill_at is not None and len(_shards(place / stores)) >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.2)
    found.code, found.seconds, found.cpu = process.returncode, time.monotonic() - began, _cpu() - spent
    return found


def _shards(stores: Path) -> dict[str, int]:
    """The shards of a store that is being made, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in stores.glob(".train-*.work/*.npz")}


def _cpu() -> float:
    """Seconds of CPU time of what this process has started and seen the end of."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _look(process: psutil.Process, peaks: dict[int, int]) -> None:
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        status = Path(f"/proc/{member.pid}/status")
        try:
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):  # it has ended
            continue
        peaks[member.pid] = 1024 * int(line.split()[1])


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the stores below a folder."""
    files = sorted(file for file in folder.glob("train-*/**/*") if file.is_file())
    found = {}
    for file in files:
        with file.open("rb") as content:
            found[str(file.relative_to(folder))] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


# What is claimed -----------------------------------------------------------------------------------------------------


def speed(place: Path, rows: int, workers: int) -> list[dict[str, Any]]:
    """Rows per second and memory, without and with the search for near duplicates and leaks."""
    table = []
    for name, stores, more in (("without", "plain", OFF), ("with", "near", ())):
        shutil.rmtree(place / stores, ignore_errors=True)
        done = run(place, stores, f"data.workers={workers}", *more)
        assert done.code == 0, f"prepare ended with {done.code}"
        tokens = _tokens(place / stores)
        table.append(
            {
                "near duplicates": name,
                "rows": rows,
                "tokens": tokens,
                "seconds": round(done.seconds, 1),
                "rows/s": rows / done.seconds,
                "tokens/s": tokens / done.seconds,
                "CPU s": round(done.cpu, 1),
                "rows per CPU s": rows / done.cpu,
                "largest process, GiB": done.largest_gib,
                "processes": len(done.peaks),
                "load": load(),
            }
        )
    return table


def _tokens(stores: Path) -> int:
    manifest = json.loads(next(stores.glob("train-*/store.json")).read_text())
    return int(manifest["tokens"])


def killed(place: Path, rows: int, workers: int) -> dict[str, Any]:
    """Killed in the middle and started again: how many shards were there, and the CPU seconds that were left."""
    shutil.rmtree(place / "killed", ignore_errors=True)
    more = (f"data.workers={workers}", *OFF)
    first = run(place, "killed", *more, kill_at=rows // SHARD_ROWS // 2)
    done = len(_shards(place / "killed"))
    second = run(place, "killed", *more)
    assert (first.code, second.code) == (-signal.SIGKILL, 0), (first, second)
    return {
        "killed after shards": done,
        "of shards": -(-rows // SHARD_ROWS),
        "the rest, CPU s": second.cpu,
        "the same bytes": digest(place / "killed") == digest(place / "plain"),
    }


def other_workers(place: Path, counts: list[int]) -> dict[str, bool]:
    """Whether the store is the same for other numbers of workers."""
    found = {}
    for count in counts:
        shutil.rmtree(place / "others", ignore_errors=True)
        assert run(place, "others", f"data.workers={count}", *OFF).code == 0
        found[f"{count} workers give the same bytes"] = digest(place / "others") == digest(place / "plain")
    return found


def added(place: Path, workers: int) -> dict[str, Any]:
    """A new source of 1,000 rows beside the million: what it takes, and whether the other store is touched."""
    write_rows(place / "new.jsonl", NEW_ROWS, seed=77)
    before = {file: file.stat().st_mtime_ns for file in (place / "near").glob("train-*/**/*") if file.is_file()}
    sources = [f"+data.sources.train.path={place / 'rows.jsonl'}", f"+data.sources.new.path={place / 'new.jsonl'}"]
    done = run(place, "near", f"data.workers={workers}", "data.train=null", *sources)
    assert done.code == 0, f"prepare ended with {done.code}"
    after = {file: file.stat().st_mtime_ns for file in (place / "near").glob("train-*/**/*") if file.is_file()}
    return {"a source more, s": done.seconds, "the other store is untouched": before == after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--others", type=int, nargs="*", default=[1, 3], help="other numbers of workers to compare")
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.folder or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        write_tokenizer(place / "tokenizer")
        write_rows(place / "rows.jsonl", given.rows, seed=0)
        table = speed(place, given.rows, given.workers)
        figures = {
            **killed(place, given.rows, given.workers),
            **other_workers(place, given.others),
            **added(place, given.workers),
        }
    about = "Synthetic conversations through the whole of prepare."
    Result("scale", command("benchmarks.scale"), figures, table, about).save()


if __name__ == "__main__":
    main()
