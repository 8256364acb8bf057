"""What the answers of the data are: JSON, one of a few words, or text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sftdist.commands.init_parts.schema import schema_of
from sftdist.data.answer_rules import parse_json

MOSTLY = 0.98  # of the answers are JSON: the rest is what the contract is for
LABELS_MOST = 30  # different answers
LABEL_SEEN = 5  # times on average, so that they are labels and no short texts
LABEL_LONG = 60  # characters


class Kind(StrEnum):
    """What a gate can ask of the answers."""

    json = "json"
    label = "label"
    text = "text"


@dataclass(frozen=True)
class Answers:
    """`share`: of the answers that are of this kind; `contract`: what all of them fulfil, as the content of a contract
    file, empty for text; `commonest`: the share of the most frequent label."""

    kind: Kind
    count: int
    share: float
    contract: dict[str, Any]
    commonest: float = 0.0
    objects: bool = False


def look_at_answers(texts: Sequence[str]) -> Answers:
    """`texts`: every trained answer that was looked at."""
    count = len(texts)
    if not count:
        return Answers(Kind.text, 0, 1.0, {})
    # A number or a lone word in quotes is JSON, too, and not what is meant by it.
    values = [value for text in texts if isinstance(value := parse_json(text)[0], dict | list)]
    if len(values) >= MOSTLY * count:
        objects = all(isinstance(value, dict) for value in values)
        return Answers(Kind.json, count, len(values) / count, {"schema": schema_of(values)}, objects=objects)
    labels = Counter(text.strip() for text in texts)
    few = 1 < len(labels) <= min(LABELS_MOST, count // LABEL_SEEN)
    if few and max(map(len, labels)) <= LABEL_LONG:
        commonest = labels.most_common(1)[0][1] / count
        return Answers(Kind.label, count, 1.0, {"rules": {"one_of": sorted(labels)}}, commonest=commonest)
    return Answers(Kind.text, count, 1.0, {})
