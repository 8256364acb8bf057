"""From the lengths of the data to the step: the longest conversation, packs, epochs, steps and what is held out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sftdist.commands.init_parts.data_facts import DataFacts

QUANTILE = 99.5
EPOCHS = ((2_000, 3.0), (100_000, 2.0), (math.inf, 1.0))  # up to so many rows
STEPS_WANTED = 200  # enough for a warm-up and a schedule
CONVERSATIONS = 128  # of a step at most
PACK_MOST = {"cuda": 8192, "cpu": 2048}  # tokens of one forward, unless a conversation is longer
FILL = 0.98  # of a pack
TO_HOLD_OUT = 100  # rows: what a gate can decide on
HELD_OUT = (0.1, 0.02, 2000)  # at most this share, usually that one, and no more rows than this


@dataclass(frozen=True)
class Size:
    """`dropped`: of the rows that were looked at, those longer than `max_len`; `held_out`: the share for validation and
    for the holdout, each; `tokens`: of one epoch."""

    max_len: int
    longest: int
    dropped: int
    pack_tokens: int
    packs: int
    epochs: float
    held_out: float
    tokens: float

    @property
    def steps(self) -> int:
        return max(1, round(self.epochs * self.tokens / (self.packs * self.pack_tokens * FILL)))


def size_of(data: DataFacts, context: int | None, gpus: int, device: str, *, own_validation: bool) -> Size:
    """`context`: of the model, in tokens; `device`: cuda or cpu; `own_validation`: a file of the user's own, so that
    no train rows are taken for it."""
    quantile = int(np.percentile(data.lengths, QUANTILE, method="higher"))
    max_len = round_up(quantile)
    if context is not None:
        max_len = min(max_len, context)
    kept = data.lengths[data.lengths <= max_len]
    held_out = held_out_share(data.usable)
    left = 1 - held_out * (1 if own_validation else 2)
    tokens = float(kept.sum()) * data.rows / data.looked * left
    epochs = next(epochs for rows, epochs in EPOCHS if data.usable <= rows)
    wanted = min(epochs * tokens / STEPS_WANTED, CONVERSATIONS * data.mean)
    pack = max(max_len, min(PACK_MOST[device], round_up(math.ceil(wanted / gpus))))
    packs = gpus * max(1, round(wanted / (pack * gpus)))
    return Size(
        max_len=max_len,
        longest=int(data.lengths.max()),
        dropped=len(data.lengths) - len(kept),
        pack_tokens=pack,
        packs=packs,
        epochs=epochs,
        held_out=held_out,
        tokens=tokens,
    )


def round_up(tokens: int) -> int:
    """To a multiple of 64, of 256 from 1,024 on: round numbers that waste little."""
    unit = 64 if tokens <= 1024 else 256
    return -(-tokens // unit) * unit


def held_out_share(rows: int) -> float:
    """Enough rows for a gate to decide on, and of few rows no more than a tenth."""
    most, usual, enough = HELD_OUT
    share = min(most, max(min(usual, enough / rows), TO_HOLD_OUT / rows))
    return math.ceil(share * 1000) / 1000


def round_number(value: float, least: int, most: int) -> int:
    """The nearest of 1, 2 and 5 times a power of ten, between two limits."""
    power = 10.0 ** math.floor(math.log10(max(1.0, value)))
    nearest = min((1, 2, 5, 10), key=lambda digit: abs(digit * power - value))
    return int(min(most, max(least, nearest * power)))
