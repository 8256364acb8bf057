"""Shards of a store that is being made: a few chunks of the input, encoded, in one file that is whole or not there.

A process that is killed leaves the shards that it has finished, and the next one finds them: a shard is known by the
store's key (in the name of its folder), its number, the places of its input with their checksums, and the code that
made it: shards are never worth a thought about what another version of this program may have written there.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftdist.core.storage import naming
from sftdist.data.encode import Columns, Job, Samples, Shard, encode_chunk, joined
from sftdist.data.problems import Problem
from sftdist.data.sources import Place, read_chunk
from sftdist.data.store import SIGNATURE_TYPE, Weights, ids_dtype

SHARD_CHUNKS = 4  # 2,048 rows: what a kill may cost each worker, and what is in memory at a time
TORN = ".tmp"
CRC_BYTES = 4  # of all that comes before them; what follows an archive does not disturb who reads it
TEXT = "text"  # the member that holds what is no array, as JSON


class Piece(Protocol):
    """A shard in memory or in a file."""

    @property
    def read(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def row_ids(self) -> list[str]: ...
    @property
    def columns(self) -> Columns: ...
    @property
    def signatures(self) -> NDArray[np.uint16] | None: ...
    def load(self) -> Shard: ...


@cache
def code_digest() -> str:
    """SHA-256 of the source of everything that makes a shard."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Work:
    """A shard to make: which one of which job, where its rows lie, and the file it becomes."""

    job: int
    number: int
    places: tuple[Place, ...]
    file: Path

    @property
    def header(self) -> dict[str, Any]:
        where = [[p.part, p.count, p.line, p.start, p.end, p.crc] for p in self.places]
        return {"code": code_digest(), "store": self.file.parent.name, "number": self.number, "places": where}


def works(job: int, places: Iterable[Place], folder: Path) -> Iterator[Work]:
    """The shards that these places make up, in order."""
    places = iter(places)
    for number in count():
        if not (several := tuple(islice(places, SHARD_CHUNKS))):
            return
        yield Work(job, number, several, folder / f"{number:06}.npz")


def make_shard(job: Job, work: Work) -> None:
    """Encode a shard and write its file, in one step."""
    save(joined([encode_chunk(job, read_chunk(place, job.parts)) for place in work.places]), work.file, work.header)


@dataclass(frozen=True)
class StoredShard:
    """A shard in its file, of which only what is asked for is read."""

    file: Path
    rows: int
    read: int
    left_out: int
    size: int

    @classmethod
    def open(cls, file: Path) -> StoredShard:
        with np.load(file) as found:
            return cls(file, *found["counts"].tolist())

    @property
    def row_ids(self) -> list[str]:
        with np.load(self.file) as found:
            return _json(found["row_ids"])

    @property
    def columns(self) -> Columns:
        with np.load(self.file) as found:
            return _columns(found)

    @property
    def signatures(self) -> NDArray[np.uint16] | None:
        with np.load(self.file) as found:
            return found.get("signatures")

    def load(self) -> Shard:
        with np.load(self.file) as found:
            text = _json(found[TEXT])
            values = np.array(text["weight_values"], dtype=np.float32)
            return Shard(
                read=self.read,
                left_out=self.left_out,
                size=self.size,
                bad=[Problem(**problem) for problem in text["bad"]],
                refused={int(i): Problem(**problem) for i, problem in text["refused"].items()},
                findings={
                    int(i): [Problem(**problem) for problem in several] for i, several in text["findings"].items()
                },
                held_out={int(i): row for i, row in text["held_out"].items()},
                rules=Counter(text["rules"]),
                lint=text["lint"],
                columns=_columns(found),
                row_ids=_json(found["row_ids"]),
                files=found["files"],
                lines=found["lines"],
                labels=found["labels"],
                label_names=[(tuple(tags), origin) for tags, origin in text["label_names"]],
                signatures=found.get("signatures"),
                samples=Samples(
                    of=found["of"],
                    lengths=found["lengths"],
                    ids=found["ids"],
                    weights=values[found["weight_class"]],
                    names=text["names"],
                ),
            )


def save(shard: Shard, file: Path, header: dict[str, Any]) -> None:
    """Write a shard; whoever looks sees no file or a whole one. (A file that a power cut tore fails its checksums.)"""
    weights = Weights()
    samples, columns = shard.samples, shard.columns
    largest = int(samples.ids.max(initial=0))
    arrays: dict[str, NDArray[Any]] = {
        "counts": np.array([shard.rows, shard.read, shard.left_out, shard.size]),
        "row_ids": _bytes(shard.row_ids),
        "contents": columns.contents,
        "prompts": columns.prompts,
        "answers": columns.answers,
        "split": columns.split,
        "refused": columns.refused,
        "flags": columns.flags,
        "files": shard.files,
        "lines": shard.lines,
        "labels": shard.labels,
        "of": samples.of,
        "lengths": samples.lengths,
        "ids": samples.ids.astype(ids_dtype(largest + 1)),
        "weight_class": weights.classes(samples.weights),
    }
    if shard.signatures is not None:
        arrays["signatures"] = shard.signatures
    text = {
        "header": header,
        "bad": [asdict(problem) for problem in shard.bad],
        "refused": {str(i): asdict(problem) for i, problem in shard.refused.items()},
        "findings": {str(i): [asdict(problem) for problem in several] for i, several in shard.findings.items()},
        "held_out": {str(i): row for i, row in shard.held_out.items()},
        "rules": shard.rules,
        "lint": shard.lint,
        "label_names": shard.label_names,
        "names": samples.names,
        "weight_values": weights.values,
    }
    arrays[TEXT] = _bytes(text)
    temp = own_file(file)
    data = _archive(arrays)
    with naming(file):
        temp.write_bytes(data + zlib.crc32(data).to_bytes(CRC_BYTES, "big"))
        temp.replace(file)


def own_file(file: Path) -> Path:
    """A name beside `file` for what this process alone writes there, which is torn where it is still there later."""
    return file.with_suffix(f".{socket.gethostname()}-{os.getpid()}{TORN}")


def _archive(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """What np.savez writes, which takes no mapping."""
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
    return data.getvalue()


def is_there(work: Work) -> bool:
    """Whether the file holds this very shard, whole: all of its bytes are compared with their checksum."""
    try:
        data = work.file.read_bytes()
    except FileNotFoundError:
        return False
    if zlib.crc32(data[:-CRC_BYTES]).to_bytes(CRC_BYTES, "big") != data[-CRC_BYTES:]:
        return False
    with np.load(BytesIO(data)) as found:
        return bool(_json(found[TEXT])["header"] == work.header)


def _bytes(value: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def _json(values: NDArray[np.uint8]) -> Any:
    return json.loads(values.tobytes())


def _columns(found: Any) -> Columns:
    return Columns(
        contents=found["contents"],
        prompts=found["prompts"],
        answers=found["answers"],
        split=found["split"],
        refused=found["refused"],
        flags=found["flags"],
    )


def signatures_of(pieces: Sequence[Piece], file: Path) -> NDArray[np.uint16]:
    """The signatures of all pieces, which must have them, end to end; mapped from `file`, for they are large."""
    rows, shape = 0, (0, 0)
    with file.open("wb") as out:
        for piece in pieces:
            found = piece.signatures
            assert found is not None, "a piece without signatures"
            out.write(np.ascontiguousarray(found, dtype=SIGNATURE_TYPE).tobytes())
            rows, shape = rows + len(found), found.shape[1:]
    if not rows:
        return np.empty((0, *shape), dtype=np.uint16)
    return np.memmap(file, dtype=SIGNATURE_TYPE, mode="r", shape=(rows, *shape)).view(np.ndarray)
