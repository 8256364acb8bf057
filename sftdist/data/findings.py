"""What is looked for in each row by itself, beside a provable mask: breaches of the contract, answers that break off,
evaluation prompts. Only train rows are looked at: what is held out must keep its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.settings import OnFinding, TrainOn
from sftdist.data.answers import trained_answers
from sftdist.data.contamination import Contamination
from sftdist.data.contract import CONTRACT_VERSION, Contract
from sftdist.data.doubts import DOUBTS_VERSION, doubts
from sftdist.data.duplicates import FLAGS
from sftdist.data.problems import Problem
from sftdist.data.schema import Conversation
from sftdist.data.store import TRAIN

CONTAMINATED, BREACH, CUT_OFF = FLAGS


@dataclass(frozen=True)
class Checks:
    """What is looked for in the rows of one source, and what is done with a row in which it is found."""

    contract: Contract | None = None
    on_breach: OnFinding = OnFinding.error
    cut_off: OnFinding = OnFinding.report
    contamination: Contamination | None = None

    def ingredients(self) -> dict[str, Any]:
        """What of it changes the bytes of a store. An `error` and a `report` leave the same rows and remember the same
        findings; the contamination files are a matter of whoever loaded them."""
        drop = self.on_breach is OnFinding.drop
        contract = None if self.contract is None else [CONTRACT_VERSION, self.contract.sha256, drop]
        return {"contract": contract, "cut_off": [DOUBTS_VERSION, self.cut_off is OnFinding.drop]}

    def flags(self, findings: Iterable[Problem]) -> int:
        """The bits of what a row with these findings leaves for."""
        drops = {CONTAMINATED: True, BREACH: self.on_breach is OnFinding.drop, CUT_OFF: self.cut_off is OnFinding.drop}
        return sum(FLAGS[kind] for kind in {problem.kind for problem in findings} if drops[kind])


def findings_of(
    checks: Checks,
    name: str,
    conversations: Sequence[Conversation],
    split: NDArray[np.uint8],
    signatures: NDArray[np.uint16] | None,
    train_on: TrainOn,
) -> dict[int, list[Problem]]:
    """By the place of the row, for train rows in which something was found; `name` is that of the source."""
    shared = _contaminated(checks, conversations, signatures)
    found: dict[int, list[Problem]] = {}
    for i in np.flatnonzero(split == TRAIN).tolist():
        row = conversations[i]
        several = [
            Problem(kind, name, row.file, row.line, row.id, reason, message, "")
            for kind, reason, message in _of(checks, row, shared[i], train_on)
        ]
        if several:
            found[i] = several
    return found


def _contaminated(
    checks: Checks, conversations: Sequence[Conversation], signatures: NDArray[np.uint16] | None
) -> Sequence[str | None]:
    if checks.contamination is None or signatures is None:
        return [None] * len(conversations)
    return checks.contamination.of(conversations, signatures)


def _of(checks: Checks, row: Conversation, shared: str | None, train_on: TrainOn) -> Iterator[tuple[str, str, str]]:
    if shared is not None:
        yield CONTAMINATED, "an evaluation prompt", shared
    if checks.contract is not None:
        for answer in trained_answers(row, train_on):
            for breach in checks.contract.breaches(answer.text):
                yield BREACH, breach.rule, f"assistant turn {answer.turn}: {breach}"
    for doubt in doubts(row, train_on):
        yield CUT_OFF, doubt.reason, str(doubt)
