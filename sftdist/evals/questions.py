"""What the data asks: the held-out conversations of token stores as prompts, none of which was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from sftdist.core.errors import DataError
from sftdist.core.settings import TrainOn
from sftdist.data.held_out import HeldOut, read_held_out
from sftdist.data.mask import trained_turns
from sftdist.data.render import Unproven
from sftdist.data.rowset import RowSet, as_keys
from sftdist.data.store import TRAIN, TokenStore
from sftdist.evals.prompts import Prompt

SHOWN = 5


def questions(
    stores: Iterable[TokenStore],
    split: str,
    trained: Sequence[RowSet],
    *,
    train_on: TrainOn,
    max_len: int,
    most: int | None,
) -> list[Prompt]:
    """At most `most` prompts of each store, chosen by the hash of their id: more of them contain the fewer.
    Conversations of more than `max_len` tokens are left out, as in training.

    A prompt is what stands before the last answer of a conversation that is trained on elsewhere; that answer is the
    reference. `trained`: the rows that the model was trained on. Raises DataError where a prompt is among them.
    """
    found: list[Prompt] = []
    for store in stores:
        fits = _names(store, max_len)
        there = (row for row in read_held_out(store.path) if row.split == split and row.conversation.id in fits)
        rows = sorted(there, key=_order)[:most]
        refuse_trained(store.name, rows, trained)
        found += [prompt for row in rows if (prompt := _question(store.name, row, train_on)) is not None]
    return found


def refuse_trained(source: str, rows: Sequence[HeldOut], trained: Sequence[RowSet]) -> None:
    """Raises DataError that names the rows whose conversation or prompt was trained on."""
    for kind, column in (("content", "contents"), ("prompt", "prompts")):
        digests = np.array([bytes.fromhex(row.content if kind == "content" else row.prompt) for row in rows], "S16")
        for seen in trained:
            keys = as_keys((seen.contents if column == "contents" else seen.prompts)[seen.split == TRAIN])
            places = np.flatnonzero(np.isin(digests, keys)).tolist()
            if bad := [rows[place].conversation.id for place in places]:
                more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
                raise DataError(
                    f"{source}: given {len(bad)} held-out row{'s' * (len(bad) != 1)} whose {kind} the model was "
                    f"trained on, in source {seen.source} ({', '.join(bad[:SHOWN])}{more}); required prompts that it "
                    "has never seen: hold these rows out before training, or take them out of the evaluation"
                )


def _names(store: TokenStore, max_len: int) -> set[str]:
    """The ids of the conversations that fit; of one whose turns are rows of their own, each is called `id#turn`."""
    names = store.row_ids(np.flatnonzero((store.split != TRAIN) & (store.lengths <= max_len)))
    return {*names, *(name.rpartition("#")[0] for name in names)}


def _order(row: HeldOut) -> bytes:
    return hashlib.sha256(row.conversation.id.encode()).digest()


def _question(source: str, row: HeldOut, train_on: TrainOn) -> Prompt | None:
    """None for a conversation that has no answer to compare with."""
    conversation = row.conversation
    try:
        turns = trained_turns(conversation.messages, train_on)
    except Unproven:
        return None
    turn, place = max(turns.items())
    answer = conversation.messages[place]
    checks = dict(conversation.checks)
    if answer.tool_calls:
        checks.setdefault("tool_calls", [call["function"] for call in answer.tool_calls])
    return Prompt(
        id=f"{source}/{conversation.id}",
        source=source,
        messages=conversation.messages[:place],
        reference=answer.content or None,  # calls alone are held against `checks`: each model writes them its own way
        tools=conversation.tools,
        tags=conversation.tags,
        turn=turn,
        checks=checks,
    )
