"""The rows that in-training evaluation runs on, as batches of one rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sftdist.data.loader import Batch, Document, Store, empty_pack, pack_documents
from sftdist.evals.loss import evaluation_packs


def evaluation_batches(
    stores: Sequence[Store],
    rows: Sequence[tuple[int, int]],
    pack_tokens: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    packing: bool = True,
) -> list[Batch]:
    """The packs of this rank over `rows` of (source, row): every row once over all ranks, equally many packs each."""
    documents = [_document(stores[source], source, row) for source, row in rows]
    lengths = np.array([len(document.ids) for document in documents], np.int64)
    packs = evaluation_packs(lengths, pack_tokens, world_size, packing=packing)[rank]
    return [pack_documents([documents[place] for place in pack]) if pack else empty_pack() for pack in packs]


def _document(store: Store, source: int, row: int) -> Document:
    ids, weights = store.tokens(row)
    return Document(ids, weights, source, store.row_ids(np.array([row], np.int64))[0])
