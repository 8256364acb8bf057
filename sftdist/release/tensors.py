"""The tensors of a model folder as bits, in blocks: without torch, in bounded memory.

A safetensors file is 8 bytes with the length of its header (little endian), the header in JSON, which says for each
tensor its dtype, shape and place, and then the values (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**22  # values at a time
WEIGHTS = "*.safetensors"
_HEADER_LIMIT = 100_000_000  # of the format itself
# dtype: the integer that holds the bits of a value, and the bits of its exponent where it is a float: all of them set
# means infinite or not a number. (F8_E4M3 has no infinity: it is not a number where all bits but the sign are set.)
_BITS: dict[str, tuple[str, int | None]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
    **{name: (f"<u{size}", None) for size in (2, 4, 8) for name in (f"I{8 * size}", f"U{8 * size}")},
    **dict.fromkeys(("BOOL", "U8", "I8"), ("u1", None)),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: where its values stand, and what they are."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.shape)

    def blocks(self, length: int = BLOCK) -> Iterator[NDArray[Any]]:
        """The bits of at most `length` values at a time, as unsigned integers."""
        kind = np.dtype(_BITS[self.dtype][0])
        with self.file.open("rb") as file:
            file.seek(self.start)
            for begin in range(0, self.size, length):
                yield np.fromfile(file, kind, min(length, self.size - begin))

    def values(self) -> Iterator[NDArray[np.float32]]:
        """The values of a float tensor in float32, block by block."""
        return (as_float32(bits, self.dtype) for bits in self.blocks())

    def non_finite(self) -> tuple[int, int] | None:
        """How many values are infinite or not a number, and the place of the first one; None where all are finite."""
        mask = _BITS[self.dtype][1]
        if mask is None:
            return None
        count, first, seen = 0, -1, 0
        for bits in self.blocks():
            wrong = np.flatnonzero((bits & bits.dtype.type(mask)) == mask)
            if len(wrong) and first < 0:
                first = seen + int(wrong[0])
            count, seen = count + len(wrong), seen + len(bits)
        return (count, first) if count else None


def as_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The values that these bits are. Raises ValueError for a dtype that is no float of 16 bits or more."""
    if dtype == "BF16":  # the upper half of a float32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F64":
        with np.errstate(over="ignore"):
            return bits.view(np.float64).astype(np.float32)
    raise ValueError(f"{dtype} is no float of 16 bits or more")


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Values as this dtype would hold them, to nearest, ties to even; in float32 again."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF_0000)).view(np.float32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of a folder, by name, nothing below it.

    Raises ValueError that names the file where one is no safetensors file, is cut short, or has a tensor twice.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(WEIGHTS)):
        for tensor in _tensors_of(path):
            if tensor.name in found:
                raise ValueError(f"{path}: it holds {tensor.name}, and so does {found[tensor.name].file.name}")
            found[tensor.name] = tensor
    return found


def _tensors_of(path: Path) -> list[Tensor]:
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_HEADER_LIMIT, total - 8):
            raise ValueError(f"{path}: it is no whole safetensors file (its header would have {length} bytes)")
        try:
            header = json.loads(file.read(length))
            found = [_tensor(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise ValueError(f"{path}: its header is not one of safetensors ({problem})") from None
    end = max((tensor.start + tensor.size * _width(tensor.dtype) for tensor in found), default=8 + length)
    if end != total:
        raise ValueError(f"{path}: it has {total} bytes, its header says {end}")
    return found


def _tensor(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"{name} has the dtype {dtype}, known are {', '.join(_BITS)}")
    if begin < 0 or end - begin != math.prod(shape) * _width(dtype):
        raise ValueError(f"{name} stands at the bytes {begin} to {end}, which its shape {list(shape)} does not fill")
    return Tensor(path, name, dtype, shape, start + begin)


def _width(dtype: str) -> int:
    return np.dtype(_BITS[dtype][0]).itemsize
