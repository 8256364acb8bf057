"""The documents of one optimizer step, pack by pack, from the plan alone: what `inspect step=N` shows.

The plan is that of `train`, and neither weights nor the engine are loaded. A store has no roles: the conversations are
read again from the sources, and their tokens must be those of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.settings import InspectConfig
from sftdist.core.storage import read_jsonl
from sftdist.data.clean import normalise
from sftdist.data.corpus import Corpus
from sftdist.data.explain import explain
from sftdist.data.pipeline import PrepareRequest, prepare
from sftdist.data.plan import Plan
from sftdist.data.planned import corpus_of, plan_spec
from sftdist.data.schema import Conversation
from sftdist.data.sources import conversations
from sftdist.data.steps import Pack, StepPlan
from sftdist.training.planned_model import cost_model, planned_config

RECORDED = Path("log") / "rows.jsonl"  # of a run: the ordered ids of the rows of each step


@dataclass(frozen=True)
class Document:
    """A row in a pack: where it comes from, and what the loss makes of it."""

    source: int
    row: int  # in the store
    length: int
    scale: float  # on the weights of its tokens

    def place(self, corpus: Corpus) -> tuple[int, str, int]:
        """Source, file and line."""
        return (self.source, *corpus.stores[self.source].origin(self.row))

    def id(self, corpus: Corpus) -> str:
        return corpus.stores[self.source].row_ids([self.row])[0]


def documents_of_step(
    cfg: InspectConfig, request: PrepareRequest, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A line per document, as `explain` gives it, with the source in its id, and `pack`: its number, where in it the
    document starts, how many documents and tokens it holds.

    Weights are those of the loss, the factor of the mixture included. Raises ConfigError for a step that there is not,
    DataError where the run in `run.dir` has noted other rows for it.
    """
    prepared = prepare(request, say)
    corpus = corpus_of(cfg, prepared)
    model = planned_config(cfg, len(corpus.template.tokenizer))
    plan = Plan(corpus.tables, plan_spec(cfg), cost_model(model, cfg.tune, corpus.supervised_share))
    packs = [_documents(pack) for pack in _step(plan, int(cfg.step or 0)).packs]
    if cfg.run.dir is not None:
        _require_noted(Path(cfg.run.dir) / RECORDED, int(cfg.step or 0), packs, corpus)
    lines = explained(request, corpus, {document.place(corpus) for pack in packs for document in pack})
    for number, pack in enumerate(packs):
        ends = list(accumulate(document.length for document in pack))
        about = {"documents": len(pack), "tokens": ends[-1], "pack_tokens": plan.spec.pack_tokens, "packs": len(packs)}
        for document, end in zip(pack, ends, strict=True):
            line = as_trained(document, lines[*document.place(corpus), document.id(corpus)], corpus)
            yield {**line, "pack": {"number": number, "start": end - document.length, **about}}


def _step(plan: Plan, number: int) -> StepPlan:
    """Steps are counted from 1, as in the logs of a run."""
    found = next(islice(plan.steps_from(), number - 1, None), None) if number > 0 else None
    if found is None:
        raise ConfigError(f"step={number}: there is no such step, required 1 to {plan.totals().steps}")
    return found


def _documents(pack: Pack) -> list[Document]:
    columns = (pack.source, pack.row, pack.length, pack.scale)
    return [Document(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def _require_noted(file: Path, step: int, packs: list[list[Document]], corpus: Corpus) -> None:
    """What a run has noted of a step must be what the plan says."""
    noted = [line["rows"] for line in read_jsonl(file) if line["step"] == step] if file.is_file() else []
    planned = [f"{corpus.names[document.source]}/{document.id(corpus)}" for pack in packs for document in pack]
    if noted and noted[-1] != planned:
        raise DataError(
            f"{file}: step {step} of the run has trained on other rows than this plan says; inspect it with the run's "
            "own configuration and data: run.dir=DIR step=N and nothing else"
        )


def explained(
    request: PrepareRequest, corpus: Corpus, wanted: set[tuple[int, str, int]]
) -> dict[tuple[int, str, int, str], dict[str, Any]]:
    """The lines of the rows at these places: one pass over the sources, of which only these are kept."""
    found = {}
    for source, entry in enumerate(request.sources):
        for row in conversations(entry.source):
            if isinstance(row, Conversation) and (source, row.file, row.line) in wanted:
                clean, _ = normalise(row, request.rules, corpus.template.trimmed_roles)
                for line in explain(corpus.template, clean, entry.mask):
                    found[source, row.file, row.line, line["id"]] = line
    return found


def as_trained(document: Document, line: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    """The line with the weights of the loss, cut where the plan cuts it. Raises DataError where the store has other
    tokens."""
    store = corpus.stores[document.source]
    tokens = [{**t, "weight": t["weight"] * document.scale} for t in line["tokens"][: document.length]]
    if [token["id"] for token in tokens] != store.tokens(document.row)[0][: document.length].tolist():
        raise DataError(f"{store.name}/{line['id']}: its tokens are not those in {store.path}; run sftdist prepare")
    return {**line, "id": f"{store.name}/{line['id']}", "tokens": tokens}
