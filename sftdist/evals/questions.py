"""What the data asks: the held-out conversations of token stores as prompts, none of which was trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import DataError
from sftdist.core.settings import Reasoning, TrainOn
from sftdist.data.held_out import HeldOut, read_held_out
from sftdist.data.mask import trained_turns, with_reasoning
from sftdist.data.render import Unproven
from sftdist.data.rowset import RowSet, as_keys
from sftdist.data.store import SPLITS, TRAIN, TokenStore
from sftdist.evals.prompts import Prompt

SHOWN = 5


@dataclass(frozen=True)
class Asked:
    """A held-out conversation and the name that it alone has among those of its store and split."""

    name: str
    row: HeldOut


def questions(stores: Iterable[TokenStore], split: str, *, max_len: int, most: int | None) -> list[Prompt]:
    """At most `most` prompts of each store, chosen by the hash of their id: more of them contain the fewer.
    Conversations of more than `max_len` tokens are left out, as in training.

    A prompt is what stands before the last answer of a conversation that is trained on elsewhere, with as much of the
    reasoning as is trained on; that answer is the reference. Both are as the store was made (`data.train_on`,
    `data.reasoning`).
    """
    found: list[Prompt] = []
    for store in stores:
        mask = store.manifest["ingredients"]["mask"]
        train_on, reasoning = TrainOn(mask["train_on"]), Reasoning(mask["reasoning"])
        chosen = sorted(_asked(store, split, max_len), key=_order)[:most]
        prompts = (_question(store.name, asked, train_on, reasoning) for asked in chosen)
        found += [prompt for prompt in prompts if prompt is not None]
    return found


def refuse_trained(stores: Iterable[TokenStore], split: str, trained: Sequence[RowSet]) -> None:
    """Raises DataError that names the rows of the split whose conversation or prompt is among those `trained` on."""
    for store in stores:
        rows = np.flatnonzero(store.split == SPLITS.index(split))
        for seen in trained:
            for kind, own, theirs in (
                ("content", store.contents, seen.contents),
                ("prompt", store.prompts, seen.prompts),
            ):
                bad = rows[np.isin(as_keys(own[rows]), as_keys(theirs[seen.split == TRAIN]))]
                if len(bad):
                    _refuse(store, store.row_ids(bad), kind, seen.source)


def _refuse(store: TokenStore, names: Sequence[str], kind: str, source: str) -> None:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise DataError(
        f"{store.name}: given {len(names)} held-out row{'s' * (len(names) != 1)} whose {kind} the model was "
        f"trained on, in source {source} ({', '.join(names[:SHOWN])}{more}); required prompts that it "
        "has never seen: hold these rows out before training, or take them out of the evaluation"
    )


def numbered(names: Iterable[str]) -> list[str]:
    """The same names, each once: the second `a` is `a~2`."""
    used: set[str] = set()
    counts: Counter[str] = Counter()
    found = []
    for name in names:
        counts[name] += 1
        own = name if counts[name] == 1 else f"{name}~{counts[name]}"
        while own in used:
            counts[name] += 1
            own = f"{name}~{counts[name]}"
        used.add(own)
        found.append(own)
    return found


def _asked(store: TokenStore, split: str, max_len: int) -> list[Asked]:
    """The conversations of the split whose rows all fit, each content once.

    The store's column says which those are: rows that leak what another store holds out are in no split.
    """
    here = store.split == SPLITS.index(split)
    long = here & (store.lengths > max_len)
    fits = _contents(store, here) - _contents(store, long)
    rows: dict[str, HeldOut] = {}
    for row in read_held_out(store.path):
        if row.split == split:
            rows.setdefault(row.content, row)
    names = numbered(row.conversation.id for row in rows.values())
    return [Asked(name, row) for name, row in zip(names, rows.values(), strict=True) if row.content in fits]


def _contents(store: TokenStore, rows: NDArray[np.bool_]) -> set[str]:
    return {digest.tobytes().hex() for digest in store.contents[rows]}


def _order(asked: Asked) -> bytes:
    return hashlib.sha256(asked.name.encode()).digest()


def _question(source: str, asked: Asked, train_on: TrainOn, reasoning: Reasoning) -> Prompt | None:
    """None for a conversation that has no answer to compare with."""
    conversation = asked.row.conversation
    try:
        turns = trained_turns(conversation.messages, train_on)
    except Unproven:
        return None
    turn, place = max(turns.items())
    messages = with_reasoning(conversation.messages, reasoning)
    answer = messages[place]
    checks = dict(conversation.checks)
    if answer.tool_calls:
        checks.setdefault("tool_calls", [call["function"] for call in answer.tool_calls])
    return Prompt(
        id=f"{source}/{asked.name}",
        source=source,
        messages=tuple(messages[:place]),
        reference=answer.content or None,  # calls alone are held against `checks`: each model writes them its own way
        tools=conversation.tools,
        tags=conversation.tags,
        turn=turn,
        checks=checks,
    )
