"""Which live prompts to label next: those out of the profile, some of each kind, no two alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.data.held_out import message_to_json
from sftdist.data.keys import digest
from sftdist.data.message import Message
from sftdist.data.near import Near, near_twins, text_signatures
from sftdist.evals.features import Features
from sftdist.evals.profile import OUT, Profile
from sftdist.evals.traffic import LiveRow

TAG = "to_label"
NEAR = Near(threshold=0.7, shingle=3)
SURPRISE = ("unusual", "strange", "alien")  # thirds of the prompts that are out, by surprise
LENGTHS = ((20, "short"), (100, "medium"))  # words, at most; more are long


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt that is out of the profile. `stratum`: how surprising, which language, how long."""

    row: LiveRow
    surprise: float
    stratum: tuple[str, str, str]


def candidates(profile: Profile, live: Features, rows: Sequence[LiveRow]) -> list[Candidate]:
    """The prompts out of the profile, the most surprising first; of near duplicates the first that came."""
    out = np.flatnonzero(profile.model.typical(live) == OUT)
    signatures = text_signatures([rows[i].prompt for i in out.tolist()], NEAR)
    out = out[near_twins(signatures, NEAR) < 0]
    surprise = profile.model.surprise(live.take(out))
    order = np.argsort(-surprise, kind="stable")
    thirds = _thirds(len(out))
    return [
        Candidate(
            rows[out[i]],
            float(surprise[i]),
            (SURPRISE[thirds[rank]], live.languages[out[i]], _length(int(live.lengths[out[i]]))),
        )
        for rank, i in enumerate(order)
    ]


def _thirds(number: int) -> NDArray[np.int64]:
    """Of ranks from the most surprising on: 2, 2, ..., 1, ..., 0."""
    return np.asarray(len(SURPRISE) - 1 - np.arange(number) * len(SURPRISE) // max(1, number), dtype=np.int64)


def _length(words: int) -> str:
    return next((name for most, name in LENGTHS if words <= most), "long")


def sample(found: Sequence[Candidate], number: int) -> list[dict[str, Any]]:
    """At most `number` rows to label: one of each stratum in turn, so that a small one is not crowded out.

    A row is a conversation that prepare reads once an assistant message with the answer is added. Inside a stratum a
    hash of the prompt decides, so that a longer sample contains the shorter one.
    """
    strata: dict[tuple[str, str, str], list[Candidate]] = {}
    for one in sorted(found, key=lambda candidate: digest(candidate.row.prompt)):
        strata.setdefault(one.stratum, []).append(one)
    turns = zip_longest(*(strata[name] for name in sorted(strata)))
    dealt: Iterator[Candidate] = (one for one in chain.from_iterable(turns) if one is not None)
    return [_to_label(one) for one, _ in zip(dealt, range(number), strict=False)]


def _to_label(one: Candidate) -> dict[str, Any]:
    surprise, language, length = one.stratum
    return {
        "id": f"{TAG}-{digest(chr(0).join(message.content for message in one.row.messages)).hex()[:16]}",
        "messages": [_turn(message) for message in one.row.messages],
        "tags": [TAG, surprise, f"language_{language}", length],
    }


def _turn(message: Message) -> dict[str, Any]:
    """What the old model said before is context, nothing to learn from."""
    return message_to_json(replace(message, train=False) if message.role == "assistant" else message)
