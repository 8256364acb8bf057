"""The safetensors files of an exported model: written one by one, hashed as they are, named when all are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sftdist.core.storage import write_json
from sftdist.training.tensor_file import write_tensors

INDEX = "model.safetensors.index.json"


class Shards:
    """Files of at most `limit` bytes (or one larger tensor). An error is kept until `finish` raises it: the other ranks
    count on this one in their collectives."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._pending: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._written: list[tuple[list[str], dict[str, Any]]] = []
        self._error: OSError | SafetensorError | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in; the shard before it goes to disk where there is no room for both."""
        if self._pending and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._size += tensor.nbytes
        self._total += tensor.nbytes
        if self._size >= self._limit:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._folder / f"part-{len(self._written)}"
        entry: dict[str, Any] = {}
        if self._error is None:
            try:
                entry = write_tensors(self._pending, path, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                self._error = error
        self._written.append((list(self._pending), entry))
        self._pending, self._size = {}, 0

    def finish(self) -> dict[str, dict[str, Any]]:
        """Give the shards their names, which hold their number, and write the index; their entries in the manifest."""
        self._flush()
        if self._error is not None:
            raise self._error
        count = len(self._written)
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        names = ["model.safetensors"] if count == 1 else names
        for number, name in enumerate(names):
            (self._folder / f"part-{number}").rename(self._folder / name)
        if count > 1:
            where = {tensor: name for name, (part, _) in zip(names, self._written, strict=True) for tensor in part}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
            write_json(self._folder / INDEX, index)
        return {name: entry for name, (_, entry) in zip(names, self._written, strict=True)}
