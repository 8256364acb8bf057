"""Whether a stack stands in a collective call: there a rank waits for others, and hears of their ends."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator

_FOLDERS = (os.path.join("torch", "distributed", ""), os.path.join("deepspeed", "comm", ""))


def in_collective(frame: traceback.FrameSummary) -> bool:
    """Whether this frame of a stack is part of a collective call."""
    return any(folder in frame.filename for folder in _FOLDERS)


def from_collective(error: BaseException) -> bool:
    """Whether an exception, or what it came from, was raised inside a collective call."""
    return any(in_collective(frame) for one in _chain(error) for frame in traceback.extract_tb(one.__traceback__))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
