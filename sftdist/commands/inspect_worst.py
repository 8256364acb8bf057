"""The rows that a checkpoint finds hardest, the worst first: what `inspect run.dir=R worst=100` shows.

A row that a model has trained on and still finds unlikely is a noisy label more often than a hard case. The loss is
that of training: the same model, template and mask, in the compute dtype of the run, without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from sftdist.commands.inspect_step import Document, as_trained, explained
from sftdist.core.errors import CheckpointError
from sftdist.core.settings import InspectConfig, Method
from sftdist.core.snapshot import require_run
from sftdist.data.loader import Batch, pack_documents
from sftdist.data.loader import Document as Tokens
from sftdist.data.pipeline import PrepareRequest, prepare
from sftdist.data.planned import corpus_of, pack_tokens
from sftdist.data.store import SPLITS, TRAIN
from sftdist.evals.row_losses import Row, require_same_tokens, rows_to_score
from sftdist.model.loss import IGNORED, LossModel, heard_losses
from sftdist.training.checkpoint_files import find, verify
from sftdist.training.offline import SavedModel, read_outline
from sftdist.training.tracking import standing

TOKENS_SHOWN = 5
SAY_EVERY = 1000  # rows


@dataclass(frozen=True)
class Hard:
    """A row with its mean loss per supervised token, in nats, weighted as in training; `places`: of its worst tokens
    in the row, with their losses."""

    row: Row
    loss: float
    places: tuple[tuple[int, float], ...]

    @property
    def order(self) -> tuple[bool, float]:
        """A loss that is not finite comes first."""
        return math.isfinite(self.loss), -self.loss


def worst_rows(cfg: InspectConfig, request: PrepareRequest, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A line per row, as `explain` gives it, with `loss`, its `place` (from 1) and `worst_tokens`.

    Looks at `limit` rows of each source, evenly spread, or at all. Raises ConfigError where `run.dir` is no run,
    CheckpointError where the checkpoint is not there or not whole, DataError where rows and model have not the same
    tokens.
    """
    logging.disable_progress_bar()
    model, name = _loaded(cfg, require_run(cfg.run.dir))
    corpus = corpus_of(cfg, prepare(request, say))
    require_same_tokens(corpus.stores, model.template)
    rows = rows_to_score(corpus.stores, SPLITS[TRAIN], max_len=cfg.data.max_len, most=cfg.limit)
    found = nsmallest(cfg.worst or 0, _scored(model.module, rows, pack_tokens(cfg), say), key=lambda one: one.order)
    say(f"the {len(found):,} of {len(rows):,} train rows with the largest loss under {name}")
    numbers = {store.name: number for number, store in enumerate(corpus.stores)}
    documents = [
        Document(numbers[one.row.store.name], one.row.number, int(one.row.store.lengths[one.row.number]), 1.0)
        for one in found
    ]
    lines = explained(request, corpus, {document.place(corpus) for document in documents})
    for place, (one, document) in enumerate(zip(found, documents, strict=True), start=1):
        line = as_trained(document, lines[*document.place(corpus), document.id(corpus)], corpus)
        worst = [{"place": at, "text": line["tokens"][at]["text"], "loss": loss} for at, loss in one.places]
        yield {**line, "place": place, "loss": one.loss, "worst_tokens": worst}


@dataclass(frozen=True)
class _Model:
    module: LossModel
    template: Any


def _loaded(cfg: InspectConfig, run_dir: Path) -> tuple[_Model, str]:
    path = find(run_dir, cfg.step or "latest", standing(run_dir, cfg.checkpoint.best))
    if problems := verify(path):
        raise CheckpointError(f"{path} does not verify: {'; '.join(problems[:5])}")
    outline = read_outline(run_dir)
    module = SavedModel(cfg, path, outline).module
    if torch.cuda.is_available() and cfg.tune.method != Method.qlora:  # what was quantised for the host stays there
        module = module.to("cuda")
    return _Model(module, outline.template), f"{run_dir.name}/{path.name}"


@torch.inference_mode()
def _scored(module: LossModel, rows: Sequence[Row], tokens: int, say: Callable[[str], None]) -> Iterator[Hard]:
    """Each row once; several share a forward where they fit into a pack."""
    device, done = next(module.parameters()).device, 0
    for part in _packs(rows, tokens):
        documents = [Tokens(*row.store.tokens(row.number), 0, row.id) for row in part]
        batch = pack_documents(documents)
        with heard_losses(module) as heard:
            module(**batch.to(device).inputs())
        yield from _hard(part, batch, heard[0].double().cpu())
        if (done + len(part)) // SAY_EVERY > done // SAY_EVERY:
            say(f"looked at {done + len(part):,} of {len(rows):,} rows")
        done += len(part)


def _packs(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    size = 0
    for row in rows:
        length = int(row.store.lengths[row.number])
        if part and size + length > tokens:
            yield part
            part, size = [], 0
        part.append(row)
        size += length
    if part:
        yield part


def _hard(rows: Sequence[Row], batch: Batch, losses: Tensor) -> Iterator[Hard]:
    """`losses`: float64 [N] at the places in the batch's `index`; the place i predicts the token i + 1."""
    weights = (batch.targets[batch.index] != IGNORED).double()
    if batch.weights is not None:
        weights = weights * batch.weights[batch.index].double()
    for row, (start, end) in zip(rows, pairwise(batch.cu_seqlens.tolist()), strict=True):
        here = (batch.index >= start) & (batch.index < end) & (weights > 0)
        mine, places = losses[here], batch.index[here] - start + 1
        order = mine.argsort(descending=True)[:TOKENS_SHOWN]
        mean = float((mine * weights[here]).sum() / weights[here].sum())
        yield Hard(row, mean, tuple((int(places[at]), float(mine[at])) for at in order))
