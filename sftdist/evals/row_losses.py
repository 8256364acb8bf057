"""The loss of each held-out row by itself: what a model makes of the reference answers, token by token.

One row a forward, so the figures depend neither on batches nor on the number of ranks, and Σ loss over Σ weight is what
training calls `eval/loss` (X6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from sftdist.core.distributed import World
from sftdist.core.errors import DataError
from sftdist.core.storage import read_json, sha256_json, write_json
from sftdist.data.loader import Document, pack_documents
from sftdist.data.store import SPLITS, TokenStore
from sftdist.data.template import ChatTemplate
from sftdist.evals.questions import numbered
from sftdist.evals.report import Scores
from sftdist.model.loss import LossModel

MEANING = "mean loss per supervised token of the reference answers, in nats; its exponential is the perplexity"


@dataclass(frozen=True)
class Row:
    """A row of a store; `id` is that of the report, `<source>/<id of the row>`."""

    id: str
    store: TokenStore
    number: int

    @property
    def content(self) -> str:
        """The digest of the whole conversation, in hex."""
        return self.store.contents[self.number].tobytes().hex()


def rows_to_score(stores: Sequence[TokenStore], split: str, *, max_len: int, most: int | None) -> list[Row]:
    """At most `most` rows of each store, evenly spread, none longer than `max_len` and each with a supervised token."""
    found = []
    for store in stores:
        rows = np.flatnonzero(store.split == SPLITS.index(split))
        named = zip(numbered(store.row_ids(rows)), rows.tolist(), strict=True)
        fits = [
            Row(f"{store.name}/{name}", store, row)
            for name, row in named
            if store.lengths[row] <= max_len and store.targets[row] > 0
        ]
        count = len(fits) if most is None else min(most, len(fits))
        found += [fits[place * len(fits) // count] for place in range(count)]
    return found


def require_same_tokens(stores: Iterable[TokenStore], template: ChatTemplate) -> None:
    """Raises DataError where the ids of a store are other tokens to the model that is asked than they were to who made
    the store: a loss on them would say nothing."""
    known = {number: token for token, number in template.tokenizer.get_vocab().items()}
    for store in {store.manifest["ingredients"]["tokenizer"]: store for store in stores}.values():
        stored = ChatTemplate.load(str(store.path / "tokenizer")).tokenizer
        names = {number: token for token, number in stored.get_vocab().items()}
        if other := sorted(number for number in known.keys() & names.keys() if known[number] != names[number]):
            theirs, ours = known[other[0]], names[other[0]]
            raise DataError(
                f"{store.name}: given rows of another tokenizer than that of the model (it has {theirs!r} where "
                f"the rows have {ours!r}), required the same for a loss; set model.tokenizer to the "
                "model's folder, or leave loss out of evals.probes"
            )


def row_losses(
    load: Callable[[], PreTrainedModel], rows: Sequence[Row], world: World, kept: Path | None = None
) -> list[tuple[float, float]]:
    """(Σ loss in nats, Σ weight) of each row, in order, on every rank. Collective.

    `kept`: a file of an earlier time with the same rows and the same model; then nothing is loaded.
    """
    known = world.broadcast_object(read_json(kept) if world.is_main and kept is not None and kept.is_file() else None)
    if known is not None:
        return [(loss, weight) for loss, weight in known]
    mine = rows[world.rank :: world.size]
    scored = _scored(load(), mine, world) if mine else []
    dealt = world.gather_objects(scored)
    found = [dealt[place % world.size][place // world.size] for place in range(len(rows))]
    if world.is_main and kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)
    return found


@torch.inference_mode()
def _scored(model: PreTrainedModel, rows: Sequence[Row], world: World) -> list[tuple[float, float]]:
    loss_model = LossModel(model, 1).eval()
    found = []
    for row in rows:
        world.progress.note("evaluating")
        ids, weights = row.store.tokens(row.number)
        batch = pack_documents([Document(ids, weights, 0, row.id)]).to(model.device)
        output = loss_model(**batch.inputs())
        found.append((float(output.per_source[0]), float(output.counts[0])))
    return found


def name_of(model: str, rows: Sequence[Row], dtype: str, device: str) -> str:
    """The name of the file that keeps these losses: it changes with everything that they depend on."""
    keys = {row.store.name: row.store.manifest["key"] for row in rows}
    return sha256_json([model, keys, [row.id for row in rows], dtype, device]) + ".losses.json"


def loss_scores(
    rows: Sequence[Row], tuned: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]] | None
) -> dict[str, Scores]:
    """`<source>.loss` for each source, and `all.loss`; a row counts by its supervised tokens."""
    places = {
        f"{source}.loss": [i for i, row in enumerate(rows) if row.store.name == source] for source in _names(rows)
    }
    if rows:
        places["all.loss"] = list(range(len(rows)))
    return {
        name: Scores(
            ids=[rows[i].id for i in chosen],
            tuned=[tuned[i][0] / tuned[i][1] for i in chosen],
            base=None if base is None else [base[i][0] / base[i][1] for i in chosen],
            weights=[tuned[i][1] for i in chosen],
            higher_is_better=False,
            low=0.0,
            high=None,
            meaning=MEANING,
        )
        for name, chosen in places.items()
    }


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.store.name for row in rows))
