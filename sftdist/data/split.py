"""Which split a conversation belongs to: a pure function of its prompt.

The same prompt lands in the same split in every source, on every machine and after every change of the
data, so no answer to a held-out prompt is ever trained on.
"""

from __future__ import annotations

from sftdist.data.store import HOLDOUT, TRAIN, VALIDATION

SPLIT_VERSION = 1


def split_of(prompt: bytes, *, validation: float, holdout: float) -> int:
    """0 train, 1 validation, 2 holdout. A prompt keeps its place when only the validation share changes.

    The holdout takes the lower end of the hash range and validation the piece above it.
    """
    place = int.from_bytes(prompt[:8], "big") / 2**64
    if place < holdout:
        return HOLDOUT
    return VALIDATION if place < holdout + validation else TRAIN
