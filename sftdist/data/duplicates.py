"""Which rows of a source stay: what is decided over all of them, from their keys and signatures alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sftdist.core.settings import NearDuplicates, OnFinding
from sftdist.data.keys import TOOLS_BYTES
from sftdist.data.near import Near, near_twins
from sftdist.data.store import TRAIN

DECIDE_VERSION = 2
# Where a row can end. Those before `duplicate` are left before anything is decided.
STAGES = (
    "read",
    "left_out",
    "bad",
    "duplicate",  # of an earlier row, in everything that is trained on
    "refused",  # the mask could not be proven
    "contaminated",  # holds an evaluation prompt
    "breach",  # of the contract
    "cut_off",
    "contradiction",
    "near_duplicate",
    "kept",
)
STAGE = {name: number for number, name in enumerate(STAGES)}
# Bits of `Facts.flags`, set for what a train row leaves for; what is only reported has no bit.
FLAGS = {"contaminated": 1, "breach": 2, "cut_off": 4}
CONTRADICTION = "contradiction"
EXAMPLES = 5  # pairs of rows of each finding


@dataclass(frozen=True)
class Facts:
    """What is known of each row by itself: digests uint8 [n, 16], split uint8 [n], signatures uint16 [n, 2, 128] (may
    be a memory map), refused bool [n], flags uint8 [n] of the bits in `FLAGS`."""

    contents: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    answers: NDArray[np.uint8]
    split: NDArray[np.uint8]
    signatures: NDArray[np.uint16] | None
    refused: NDArray[np.bool_]
    flags: NDArray[np.uint8]


@dataclass(frozen=True)
class Decision:
    """Per row the place in `STAGES` where it ends (uint8 [n]) and the row that it leaves for (int64 [n], or -1).

    `contradicts` int64 [n]: the row with another answer to the same prompt, or -1, whether one of them leaves or not.
    `found` counts rows by finding, whether they leave or not; `examples` are pairs of rows (a row, its twin).
    """

    stage: NDArray[np.uint8]
    twin: NDArray[np.int64]
    contradicts: NDArray[np.int64]
    found: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def decide(
    facts: Facts,
    *,
    deduplicate: bool,
    near: Near | None,
    near_duplicates: NearDuplicates,
    contradictions: OnFinding,
) -> Decision:
    """Of exact duplicates the first stays. For everything else only train rows leave: a held-out row keeps its place
    whatever is added beside it.

    Rows that already left are not looked at again: a row is no near duplicate of a refused one. Contradictions come
    before near duplicates, for two long rows that differ in the answer's one number are both.
    """
    rows = len(facts.split)
    stage = np.full(rows, STAGE["kept"], dtype=np.uint8)
    decision = Decision(stage, np.full(rows, -1, dtype=np.int64), np.full(rows, -1, dtype=np.int64))
    if deduplicate:
        first = _first_of(facts.contents)
        again = first != np.arange(rows)
        _note(decision, "duplicate", again, first, leaves=True)
    stage[(stage == STAGE["kept"]) & facts.refused] = STAGE["refused"]
    train = facts.split == TRAIN
    for name, bit in FLAGS.items():
        stage[(stage == STAGE["kept"]) & train & (facts.flags & bit > 0)] = STAGE[name]
    twin = _contradicting(facts, np.flatnonzero(stage == STAGE["kept"]))
    decision.contradicts[:] = twin
    _note(decision, CONTRADICTION, twin >= 0, twin, leaves=train & (contradictions is OnFinding.drop))
    if near is not None and facts.signatures is not None and near_duplicates is not NearDuplicates.off:
        drop = near_duplicates is NearDuplicates.drop
        for split in np.unique(facts.split).tolist():
            among = np.flatnonzero((stage == STAGE["kept"]) & (facts.split == split))
            twin = near_twins(facts.signatures[:, 0], near, among)
            _note(decision, "near_duplicate", twin >= 0, twin, leaves=drop and split == TRAIN)
    return decision


def _note(
    decision: Decision,
    name: str,
    which: NDArray[np.bool_],
    twin: NDArray[np.int64],
    leaves: bool | NDArray[np.bool_],
) -> None:
    """Count rows and show a few; those that leave go to the stage of that name."""
    rows = np.flatnonzero(which)
    if len(rows):
        decision.found[name] = decision.found.get(name, 0) + len(rows)
        shown = decision.examples.setdefault(name, [])
        shown += [(int(row), int(twin[row])) for row in rows[: EXAMPLES - len(shown)]]
    gone = np.flatnonzero(which & leaves)
    decision.stage[gone] = STAGE[name]
    decision.twin[gone] = twin[gone]


def _contradicting(facts: Facts, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of these rows the first one with the same prompt and tools and another answer, or -1; -1 for all other
    rows."""
    twin = np.full(len(facts.split), -1, dtype=np.int64)
    if not len(rows):
        return twin
    answers = facts.answers[rows]
    first = _first_of(np.concatenate([facts.prompts[rows], answers[:, :TOOLS_BYTES]], axis=1))  # of the prompt
    differs = np.any(answers != answers[first], axis=1)
    # The first row of a prompt contradicts the first one that differs from it; all others contradict one of the two.
    other = np.full(len(rows), -1, dtype=np.int64)
    late = np.flatnonzero(differs)[::-1]
    other[first[late]] = late
    against = np.where(differs, first, other[first])
    twin[rows] = np.where(against >= 0, rows[against], -1)
    return twin


def _first_of(digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each row of [n, bytes] the first row that equals it (itself, where none came before)."""
    if not len(digests):
        return np.empty(0, dtype=np.int64)
    whole = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}").ravel()
    _, first, of = np.unique(whole, return_index=True, return_inverse=True)
    return first[of]
