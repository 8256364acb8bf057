"""The data report as figures: what came in, what left and why, how long rows are, and rows to read.

`report_training` adds what the configured training makes of it, `report_verdict` what a person should look at first;
`report_page` and `report_terminal` show it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.data.fitting import BLOCK
from sftdist.data.problems import Problems
from sftdist.data.store import SPLITS, TRAIN, TokenStore
from sftdist.data.template import ChatTemplate

REPORT_VERSION = 2
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
# The last length of each bar of the histogram: four bars for each doubling, all of them whole numbers.
EDGES = (1, 2, 3, *(quarter << power for power in range(21) for quarter in (4, 5, 6, 7)))
QUANTILES = (0.5, 0.9, 0.99)
SAMPLES = 10
# What a store says of itself beside its counts; each is shown where it is there.
SECTIONS = ("rules", "found", "examples", "lint", "contract", "coverage")


@dataclass(frozen=True)
class Preparation:
    """A store, whether it was there before, and which ingredients differ from the one before it."""

    store: TokenStore
    reused: bool
    changed: list[str]


def data_report(done: list[Preparation], problems: Problems, template: ChatTemplate) -> dict[str, Any]:
    """The report as JSON."""
    shares = [SAMPLES // len(done) + (i < SAMPLES % len(done)) for i in range(len(done))]
    samples = [sample for found, n in zip(done, shares, strict=True) for sample in _samples(found.store, template, n)]
    return {
        "version": REPORT_VERSION,
        "sources": {found.store.name: _source(found) for found in done},
        "dropped": [
            {"kind": group.kind, "reason": group.reason, "rows": group.rows, "examples": group.examples}
            for group in sorted(problems.groups.values(), key=lambda group: (group.kind, -group.rows, group.reason))
        ],
        "conversations": samples,
    }


def _source(found: Preparation) -> dict[str, Any]:
    store = found.store
    stages = {**store.manifest["counts"], **store.manifest["splits"]}
    return {
        "store": str(store.path),
        "reused": found.reused,
        "changed": found.changed,
        "held_out": store.manifest["ingredients"]["split"]["split"] is not None,  # a file of the user's own
        "stages": {
            name: {**count, "share": _share(count["targets"], count["tokens"])} for name, count in stages.items()
        },
        "lengths": lengths_of(store),
        "lost_at_max_len": {str(length): lost_at(store, length) for length in LENGTHS},
        "longest": int(store.lengths.max(initial=0)),
        **{section: store.manifest[section] for section in SECTIONS if store.manifest.get(section)},
    }


def _share(targets: float, tokens: int) -> float | None:
    return round(targets / tokens, 4) if tokens else None


def lengths_of(store: TokenStore) -> dict[str, Any]:
    """The histogram of the train rows' lengths in tokens: `rows[i]` of them have `from[i]` to `to[i]` tokens.

    `quantiles`: the length that so large a share of the train rows does not exceed.
    """
    counts = np.zeros(len(EDGES) + 1, np.int64)
    for first in range(0, len(store), BLOCK):
        lengths = store.lengths[first : first + BLOCK][store.split[first : first + BLOCK] == TRAIN]
        counts += np.bincount(np.searchsorted(EDGES, lengths), minlength=len(counts))
    used = np.flatnonzero(counts)
    bars = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0)
    ends = np.array([*EDGES, np.iinfo(np.int32).max])
    starts = np.array([1, *(edge + 1 for edge in EDGES)])
    return {
        "from": starts[bars].tolist(),
        "to": ends[bars].tolist(),
        "rows": counts[bars].tolist(),
        "quantiles": _quantiles(store.lengths[store.split == TRAIN]),
    }


def _quantiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    if not len(lengths):
        return {}
    found = np.quantile(lengths, QUANTILES, method="inverted_cdf")
    return {str(share): int(length) for share, length in zip(QUANTILES, found, strict=True)}


def lost_at(store: TokenStore, length: int) -> dict[str, Any]:
    """Train rows longer than `length`, their tokens and supervised weight: what `overlong=drop` would lose."""
    over = (store.split == TRAIN) & (store.lengths > length)
    return {
        "rows": int(over.sum()),
        "tokens": int(store.lengths[over].sum(dtype=np.int64)),
        "targets": float(store.targets[over].sum()),
    }


def _samples(store: TokenStore, template: ChatTemplate, count: int) -> list[dict[str, Any]]:
    """Rows spread evenly over the store, decoded, cut into runs of supervised and other text."""
    rows = np.unique(np.linspace(0, len(store) - 1, count).astype(int)) if len(store) else np.empty(0, int)
    return [
        {
            "source": store.name,
            "id": store.row_ids([int(row)])[0],
            "split": (*SPLITS, "leaked")[int(store.split[row])],
            "runs": decoded_runs(*store.tokens(int(row)), template),
        }
        for row in rows
    ]


def decoded_runs(ids: np.ndarray, weights: np.ndarray, template: ChatTemplate) -> list[dict[str, Any]]:
    """`{"text", "weight"}` for each stretch of tokens with the same weight."""
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    return [
        {"text": template.tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), "weight": float(weights[a])}
        for a, b in pairwise(borders)
    ]
