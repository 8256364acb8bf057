"""What a run trains on: open token stores, their template, and what the plan knows of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import DataError
from sftdist.core.storage import sha256_json
from sftdist.data.fitting import Amount, Fitted, Rows, fit
from sftdist.data.mixture import SourceTable, resolve_lambdas
from sftdist.data.store import TRAIN, VALIDATION, TokenStore
from sftdist.data.template import ChatTemplate


@dataclass(frozen=True)
class Mix:
    """What is asked of one source: its lambda (None: its natural share) and how often it may be seen."""

    lam: float | None = None
    max_passes: float | None = None


@dataclass(frozen=True)
class Corpus:
    """The sources of a run, in their order. `fitted`: what `data.max_len` left of each train split, and took.

    `held_out`: the stores of the user's own validation and holdout files.
    """

    stores: tuple[TokenStore, ...]
    held_out: tuple[TokenStore, ...]
    template: ChatTemplate
    tables: tuple[SourceTable, ...]
    fitted: tuple[Fitted, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(store.name for store in self.stores)

    @property
    def largest_id(self) -> int:
        return max(int(store.manifest["largest_id"]) for store in self.stores)

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over tokens, of everything that is trained on."""
        kept = sum((fitted.kept for fitted in self.fitted), Amount())
        return kept.targets / kept.tokens


def open_corpus(
    stores: Mapping[str, TokenStore],
    held_out: Mapping[str, TokenStore],
    template: ChatTemplate,
    mixes: Mapping[str, Mix],
    *,
    max_len: int,
    overlong: str,
    temperature: float | None = None,
) -> Corpus:
    """Each source's table for the plan. Raises DataError where nothing is left of a source."""
    opened = tuple(stores.values())
    fitted = tuple(_fitted(store, max_len, overlong) for store in opened)
    totals = [one.kept.targets for one in fitted]
    lambdas = resolve_lambdas(totals, [mixes[store.name].lam for store in opened], temperature)
    tables = tuple(
        SourceTable(
            name=store.name,
            lengths=one.lengths,
            targets=one.targets,
            rows=one.rows,
            lam=lam,
            max_passes=mixes[store.name].max_passes,
            key=sha256_json([store.manifest["key"], max_len, overlong]),
            total_targets=total,
        )
        for store, one, lam, total in zip(opened, fitted, lambdas, totals, strict=True)
    )
    return Corpus(opened, tuple(held_out.values()), template, tables, fitted)


def _fitted(store: TokenStore, max_len: int, overlong: str) -> Fitted:
    chosen = store.split == TRAIN
    if not chosen.any():
        raise DataError(
            f"source {store.name}: no conversation in the train split, at least one is required; "
            "lower data.val_fraction and data.holdout_fraction, or give more data"
        )

    def kept_targets(over: Rows) -> NDArray[np.float64]:
        return np.array([float(store.tokens(int(row))[1][:max_len].sum(dtype=np.float64)) for row in over])

    return fit(
        store.lengths, store.targets, max_len, overlong, name=store.name, chosen=chosen, kept_targets=kept_targets
    )


def validation_sources(corpus: Corpus) -> tuple[TokenStore, ...]:
    """The stores that hold validation rows: the user's own file where there is one, else the sources' own split."""
    own = tuple(store for store in corpus.held_out if (store.split == VALIDATION).any())
    return own or corpus.stores


def validation_rows(stores: Sequence[TokenStore], max_len: int, most: int | None) -> list[tuple[int, int]]:
    """(store, row) of the validation split: at most `most` per store, evenly spread, none longer than `max_len`."""
    chosen: list[tuple[int, int]] = []
    for number, store in enumerate(stores):
        rows = np.flatnonzero((store.split == VALIDATION) & (store.lengths <= max_len) & (store.targets > 0))
        count = len(rows) if most is None else min(most, len(rows))
        chosen += [(number, int(rows[place * len(rows) // count])) for place in range(count)]
    return chosen


def overlong_lines(corpus: Corpus, max_len: int) -> Iterator[str]:
    """What `data.max_len` costs, one line per source that loses something."""
    for store, one in zip(corpus.stores, corpus.fitted, strict=True):
        dropped, cut = one.dropped, one.truncated
        if dropped.rows or cut.rows:
            yield (
                f"source {store.name}: max_len={max_len} drops {dropped.rows:,} conversations "
                f"({dropped.tokens:,} tokens, {dropped.targets:,.0f} supervised) and cuts "
                f"{cut.rows:,} ({cut.tokens:,} tokens, {cut.targets:,.0f} supervised)"
            )
