"""The token store: one source, tokenised once, read by memory map and never written again.

A store is a directory of plain little-endian arrays (one file a column, so that writing streams and
reading touches only what is asked for) with `store.json` beside them: where the rows came from, under
which content key, and the figures that the start-up checks need. It is published atomically.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import DataError
from sftdist.core.storage import publish_directory, read_json, write_json
from sftdist.data.keys import DIGEST_BYTES

STORE_FORMAT = 3
SPLITS = ("train", "validation", "holdout")
TRAIN, VALIDATION, HOLDOUT = range(3)
LEAKED = 3  # in memory only: rows that `data.leaks` keeps out of training
WEIGHT_CLASSES = 256  # one byte a token says which of these weights it has

# Columns whose type does not depend on the vocabulary. *_offsets have one entry more than there are rows.
COLUMNS: dict[str, str] = {
    "weight_class": "<u1",
    "offsets": "<i8",
    "lengths": "<i4",
    "targets": "<f8",
    "split": "<u1",
    "origin": "<i8",
    "row_ids": "<u1",
    "row_id_offsets": "<i8",
    "contents": "|u1",
    "prompts": "|u1",
    "labels": "<u4",
}
LABELS = "labels.json"  # a list of {"tags", "label_origin"}, in which the column `labels` counts
SIGNATURES, SIGNATURE_TYPE = "signatures", "<u2"  # only in stores that look for near duplicates


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows in store order, column by column: `ids` int32 and `weights` float32 are all rows end to end.

    `contents` and `prompts` uint8 [rows, DIGEST_BYTES] are the keys of the whole conversation and of its prompt,
    `signatures` uint16 [rows, 2, permutations] those of near duplicates; `labels` are numbers of `labels.json`.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    lengths: NDArray[np.int32]
    split: NDArray[np.uint8]
    files: NDArray[np.integer[Any]]
    lines: NDArray[np.int64]
    row_ids: Sequence[str]
    contents: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    labels: NDArray[np.uint32]
    signatures: NDArray[np.uint16] | None = None


@dataclass(slots=True)
class StoreFigures:
    """What is known after the last row: counts per split, and what the start-up checks look at."""

    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    targets: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0.0))
    largest_id: int = -1
    last_supervised: Counter[int] = field(default_factory=Counter)

    def stop_share(self, stop_ids: Iterable[int]) -> float:
        """Share of the rows whose last supervised token ends a turn; 1.0 in a sound store."""
        rows = sum(self.rows.values())
        return sum(self.last_supervised[i] for i in set(stop_ids)) / rows if rows else 1.0


@dataclass(frozen=True)
class TokenStore:
    """An open store. `ids` and `weight_class` are [tokens], the others [rows]; class 0 is weight 0.

    `weight_values[weight_class[i]]` is the weight of token i as a target; `targets` is the sum of the
    weights of a row; `split` is 0 train, 1 validation, 2 holdout; `manifest` is `store.json`. `contents`, `prompts`,
    `labels` and `signatures` are as in a `Block`; of the turns of one conversation, each a row, they are the same.
    """

    name: str
    path: Path
    manifest: dict[str, Any]
    ids: NDArray[np.uint16] | NDArray[np.uint32]
    weight_class: NDArray[np.uint8]
    weight_values: NDArray[np.float32]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    targets: NDArray[np.float64]
    split: NDArray[np.uint8]
    contents: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    labels: NDArray[np.uint32]
    signatures: NDArray[np.uint16] | None
    _origin: NDArray[np.int64]
    _row_ids: NDArray[np.uint8]
    _row_id_offsets: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Map a published store; a wrong format or a file of the wrong size is a `DataError`."""
        manifest = read_json(path / "store.json")
        if manifest["format"] != STORE_FORMAT:
            required = f"format {STORE_FORMAT}; delete the folder and run prepare again"
            raise DataError(f"{path}: given a store of format {manifest['format']}, required {required}")
        rows, tokens = manifest["rows"], manifest["tokens"]
        id_bytes, permutations = manifest["row_id_bytes"], manifest["permutations"]
        digests = (rows, DIGEST_BYTES)
        signatures = None
        if permutations:
            signatures = _map(path, SIGNATURES, SIGNATURE_TYPE, rows * 2 * permutations)
            signatures = signatures.reshape(rows, 2, permutations)
        return cls(
            name=manifest["name"],
            path=path,
            manifest=manifest,
            ids=_map(path, "ids", manifest["ids_dtype"], tokens),
            weight_class=_map(path, "weight_class", COLUMNS["weight_class"], tokens),
            weight_values=np.asarray(manifest["weight_values"], dtype=np.float32),
            offsets=_map(path, "offsets", COLUMNS["offsets"], rows + 1),
            lengths=_map(path, "lengths", COLUMNS["lengths"], rows),
            targets=_map(path, "targets", COLUMNS["targets"], rows),
            split=_map(path, "split", COLUMNS["split"], rows),
            contents=_map(path, "contents", COLUMNS["contents"], rows * DIGEST_BYTES).reshape(digests),
            prompts=_map(path, "prompts", COLUMNS["prompts"], rows * DIGEST_BYTES).reshape(digests),
            labels=_map(path, "labels", COLUMNS["labels"], rows),
            signatures=signatures,
            _origin=_map(path, "origin", COLUMNS["origin"], rows * 2).reshape(rows, 2),
            _row_ids=_map(path, "row_ids", COLUMNS["row_ids"], id_bytes),
            _row_id_offsets=_map(path, "row_id_offsets", COLUMNS["row_id_offsets"], rows + 1),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The ids of a row and the weight of each of them as a target."""
        span = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.ids[span].astype(np.int32), self.weight_values[self.weight_class[span]]

    def row_ids(self, rows: NDArray[np.integer[Any]] | Sequence[int]) -> list[str]:
        starts = self._row_id_offsets
        return [self._row_ids[int(starts[r]) : int(starts[r + 1])].tobytes().decode() for r in rows]

    def labels_of(self, rows: NDArray[np.bool_]) -> dict[tuple[tuple[str, ...], str | None], int]:
        """How many of these rows [rows] have which tags and label origin."""
        names = read_json(self.path / LABELS)
        counts = np.bincount(self.labels[rows], minlength=len(names)).tolist()
        return {(tuple(n["tags"]), n["label_origin"]): count for n, count in zip(names, counts, strict=True) if count}

    def origin(self, row: int) -> tuple[str, int]:
        """The file (as named in the content key) and the line that a row came from."""
        file, line = self._origin[row]
        return self.manifest["files"][int(file)], int(line)


def ids_dtype(vocabulary: int) -> str:
    """Two bytes a token where every id fits into them, else four."""
    return "<u2" if vocabulary < 65_536 else "<u4"


def write_store(
    final: Path,
    produce: Callable[[Path], Iterable[Block]],
    *,
    name: str,
    vocabulary: int,
    describe: Callable[[StoreFigures], dict[str, Any]],
) -> TokenStore:
    """Write blocks as a store at `final` and open it; only a complete store ever appears there.

    `produce` gets the folder, so that it can write further files beside the columns; `describe` turns the
    figures into further keys of `store.json` once the last block is written.
    """
    with publish_directory(final) as folder:
        with StoreWriter(folder, ids_dtype(vocabulary)) as writer:
            for block in produce(folder):
                writer.add(block)
        described = describe(writer.figures)
        write_json(folder / "store.json", {"format": STORE_FORMAT, "name": name, **writer.header(), **described})
    return TokenStore.open(final)


class Weights:
    """One byte for each of the weights that there are, numbered as they come; 0 is weight 0, 1 is weight 1."""

    def __init__(self) -> None:
        self._numbers: dict[float, int] = {0.0: 0, 1.0: 1}

    @property
    def values(self) -> list[float]:
        return list(self._numbers)

    def classes(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The number of each weight; `DataError` where there are too many."""
        classes = (weights == 1).astype(np.uint8)
        other = (weights != 0) & (weights != 1)
        if other.any():
            for value in np.unique(weights[other]):
                classes[weights == value] = self._number(float(value))
        return classes

    def _number(self, weight: float) -> int:
        number = self._numbers.setdefault(weight, len(self._numbers))
        if number >= WEIGHT_CLASSES:
            required = f"at most {WEIGHT_CLASSES} different weights in one source; round them"
            raise DataError(f"messages[].weight: given more than {WEIGHT_CLASSES - 1} values, required {required}")
        return number


class StoreWriter:
    """Appends blocks to the column files of a folder; memory does not grow with the number of rows."""

    def __init__(self, folder: Path, ids_type: str) -> None:
        self.figures = StoreFigures()
        self._ids_type = ids_type
        self._folder = folder
        self._weights = Weights()
        self._permutations = 0
        self._rows = self._tokens = self._id_bytes = 0
        self._files: dict[str, BinaryIO] = {c: (folder / f"{c}.bin").open("wb") for c in ("ids", *COLUMNS)}
        self._append("offsets", np.zeros(1))
        self._append("row_id_offsets", np.zeros(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def add(self, block: Block) -> None:
        if not len(block.lengths):
            return
        ends = np.cumsum(block.lengths, dtype=np.int64)
        starts = ends - block.lengths
        assert ends[-1] == len(block.ids) == len(block.weights), "columns of a block have different lengths"
        assert block.ids.max() <= np.iinfo(self._ids_type).max, "an id is larger than the vocabulary"
        assert not block.weights[starts].any(), "the first token of a row is nobody's target"
        targets = np.add.reduceat(block.weights.astype(np.float64), starts)
        id_lengths = np.array([len(text.encode()) for text in block.row_ids], dtype=np.int64)
        self._append("ids", block.ids)
        self._append("weight_class", self._weights.classes(block.weights))
        self._append("offsets", self._tokens + ends)
        self._append("lengths", block.lengths)
        self._append("targets", targets)
        self._append("split", block.split)
        self._append("origin", np.stack([block.files, block.lines], axis=1))
        self._files["row_ids"].write("".join(block.row_ids).encode())
        self._append("row_id_offsets", self._id_bytes + np.cumsum(id_lengths))
        self._append("contents", block.contents)
        self._append("prompts", block.prompts)
        self._append("labels", block.labels)
        if block.signatures is not None:
            self._permutations = block.signatures.shape[2]
            self._append(SIGNATURES, block.signatures)
        self._rows += len(block.lengths)
        self._tokens += int(ends[-1])
        self._id_bytes += int(id_lengths.sum())
        self._count(block, starts, targets)

    def header(self) -> dict[str, Any]:
        return {
            "rows": self._rows,
            "tokens": self._tokens,
            "row_id_bytes": self._id_bytes,
            "ids_dtype": self._ids_type,
            "permutations": self._permutations,
            "weight_values": self._weights.values,
            "largest_id": self.figures.largest_id,
            "splits": {
                split: {
                    "rows": self.figures.rows[split],
                    "tokens": self.figures.tokens[split],
                    "targets": self.figures.targets[split],
                }
                for split in SPLITS
            },
        }

    def _append(self, column: str, values: NDArray[Any]) -> None:
        kind = self._ids_type if column == "ids" else SIGNATURE_TYPE if column == SIGNATURES else COLUMNS[column]
        if column not in self._files:
            self._files[column] = (self._folder / f"{column}.bin").open("wb")
        self._files[column].write(np.ascontiguousarray(values, dtype=kind).tobytes())

    def _count(self, block: Block, starts: NDArray[np.int64], targets: NDArray[np.float64]) -> None:
        figures = self.figures
        for number, split in enumerate(SPLITS):
            here = block.split == number
            figures.rows[split] += int(here.sum())
            figures.tokens[split] += int(block.lengths[here].sum())
            figures.targets[split] += float(targets[here].sum())
        figures.largest_id = max(figures.largest_id, int(block.ids.max()))
        # The place of the last supervised token of each row: the running maximum of supervised places.
        places = np.where(block.weights > 0, np.arange(len(block.ids)), -1)
        last = np.maximum.reduceat(places, starts)
        figures.last_supervised.update(block.ids[last[last >= 0]].tolist())


def _map(path: Path, column: str, kind: str, size: int) -> NDArray[Any]:
    file = path / f"{column}.bin"
    expected = size * np.dtype(kind).itemsize
    found = file.stat().st_size if file.is_file() else -1
    if found != expected:
        given = f"{found} bytes" if found >= 0 else "no such file"
        raise DataError(f"{file}: given {given}, required {expected} bytes; delete the folder and run prepare again")
    if not size:
        return np.empty(0, dtype=kind)
    return np.memmap(file, dtype=kind, mode="r").view(np.ndarray)
