"""The rows of a source as what compares data sees them: digests, splits and names, none of the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.data.store import LEAKED, SPLITS

_PLACE = re.compile(r":\d+(\.\d+)?(#\d+)?$")


@dataclass(frozen=True)
class RowSet:
    """`contents` and `prompts` are uint8 [rows, 16], `split` uint8 [rows]; `ids` names the rows of some places."""

    source: str
    contents: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    split: NDArray[np.uint8]
    ids: Callable[[NDArray[np.int64]], list[str]]

    def all_ids(self) -> list[str]:
        return self.ids(np.arange(len(self.split)))


def as_keys(digests: NDArray[np.uint8]) -> NDArray[Any]:
    """uint8 [rows, 16] as one value a row that sorts and compares: numpy pads with zeros, so equal means equal."""
    return np.ascontiguousarray(digests).view("S16").reshape(len(digests))


def first_places(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The place of the first row of each content, in order; a conversation may stand in several rows."""
    return np.sort(np.unique(as_keys(digests), return_index=True)[1])


def is_place(row_id: str) -> bool:
    """Whether an id only says where the row stood (`file:line`): when one is taken out, others move there."""
    return _PLACE.search(row_id) is not None


def split_name(split: int) -> str:
    """How a split is told, that of rows which are kept out of training, too."""
    return "leaked" if split == LEAKED else SPLITS[split]
