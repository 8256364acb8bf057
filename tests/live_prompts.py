"""Prompts of the quickstart's sources as live traffic: samples of each, and of mixtures of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sftdist.assets import desk
from sftdist.core.storage import read_jsonl
from sftdist.evals.features import Features, features_of

SOURCES = ("domain", "format", "general")


def prompt(source: str, place: int) -> str:
    """What the user says in a row of the quickstart."""
    *said, _ = desk.texts(_rows(source)[place])
    return "\n\n".join(said) if source == "general" else said[-1]


def answer(source: str, place: int) -> str:
    return desk.texts(_rows(source)[place])[-1]


@cache
def _rows(source: str) -> list[dict[str, object]]:
    return desk.rows(source)


@dataclass(frozen=True)
class Pool:
    """Prompts of several sources with their features, to draw samples from without giving one twice."""

    texts: Mapping[str, list[str]]
    features: Mapping[str, Features]

    @classmethod
    def of(cls, texts: Mapping[str, list[str]]) -> Pool:
        return cls(texts, {source: features_of(found) for source, found in texts.items()})

    def deck(self, seed: int) -> Deck:
        rng = np.random.default_rng(seed)
        return Deck(self, rng, {source: rng.permutation(len(texts)) for source, texts in self.texts.items()})


@dataclass
class Deck:
    """A pool, shuffled: each prompt is drawn once."""

    pool: Pool
    rng: np.random.Generator
    order: dict[str, np.ndarray]
    taken: dict[str, int] = field(default_factory=dict)

    def draw(self, number: int, shares: Mapping[str, float]) -> tuple[Features, list[str], list[str]]:
        """Features, source and text of prompts whose sources are drawn by these shares."""
        sources, texts, parts = [], [], []
        for source, count in zip(shares, self.rng.multinomial(number, list(shares.values())).tolist(), strict=True):
            start = self.taken.get(source, 0)
            rows = self.order[source][start : start + count]
            assert len(rows) == count, f"{source} has no more prompts"
            self.taken[source] = start + count
            parts.append(self.pool.features[source].take(rows))
            sources += [source] * count
            texts += [self.pool.texts[source][row] for row in rows.tolist()]
        return joined(parts), sources, texts


def joined(parts: Sequence[Features]) -> Features:
    """The features of several lists of texts, end to end."""
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    return Features(
        np.concatenate([part.lengths for part in parts]),
        [language for part in parts for language in part.languages],
        np.concatenate([part.digests for part in parts]),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate([part.places for part in parts]),
    )


def desk_pool() -> Pool:
    """All prompts of the quickstart."""
    return Pool.of({source: [prompt(source, i) for i in range(desk.ROWS[source])] for source in SOURCES})


def real_pool(folder: Path) -> Pool:
    """All prompts of the real chat data."""

    def rows(name: str) -> list[dict[str, Any]]:
        return list(read_jsonl(folder / name))

    def said(row: dict[str, str]) -> str:
        return row["instruction"] + (f"\n\n{row['input']}" if row.get("input", "").strip() else "")

    return Pool.of(
        {
            "domain": [row["messages"][1]["content"] for row in rows("domain_gsm8k.messages.jsonl")],
            "format": [row["conversations"][0]["value"] for row in rows("format_toolformer.sharegpt.jsonl")],
            "general": [said(row) for row in rows("general_gpteacher.alpaca.jsonl")],
        }
    )
