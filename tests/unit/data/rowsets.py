"""Rows of a source with real digests and splits, for the tests of what compares data."""

from __future__ import annotations

import numpy as np

from sftdist.data.keys import content_key, prompt_key
from sftdist.data.rowset import RowSet
from sftdist.data.schema import Conversation, Message
from sftdist.data.split import split_of

Row = tuple[str, str, str]  # id, prompt, answer


def row_set(source: str, rows: list[Row], fraction: float, fixed: int | None = None) -> RowSet:
    """`fixed`: the split of all rows; without, the prompt decides about the holdout alone."""
    made = [Conversation(i, (Message("user", prompt), Message("assistant", answer))) for i, prompt, answer in rows]
    prompts = [prompt_key(row) for row in made]
    split = [split_of(p, validation=0.0, holdout=fraction) if fixed is None else fixed for p in prompts]
    return RowSet(
        source,
        np.array([list(content_key(row)) for row in made], np.uint8).reshape(-1, 16),
        np.array([list(p) for p in prompts], np.uint8).reshape(-1, 16),
        np.array(split, np.uint8),
        lambda places: [rows[place][0] for place in places],
    )
