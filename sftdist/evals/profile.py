"""What a release knows of its prompts: counts of them that live prompts are compared with, and no text.

A third of the prompts teaches: which words each source uses, the topics, what is typical. The others are counted with
what was learned, exactly as live prompts are later, so that the two can be compared: no text is both.
"""

from __future__ import annotations

import base64
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import DataError
from sftdist.core.storage import read_json, write_json
from sftdist.data.keys import digest
from sftdist.data.style import bucket
from sftdist.evals.features import FEATURES_VERSION, PLACES, WORDS, Features, features_of
from sftdist.evals.topics import rarity, topic_of, topics

PROFILE_FORMAT = 1
PROFILE = "profile.json"
LEAST_PROMPTS = 20
LEARNED = 1 / 3
MOST_PROMPTS = 20_000
TOPICS = 12
SMOOTHING = 0.1  # added to the count of each place
LENGTH_GROUPS = 4
TEXTS_OF_GROUP = 100  # at least: the border of the least usual hundredth is among them
LEVELS = (0.01, 0.05, 0.2, 0.5, 0.8)  # borders of how typical a prompt is: shares of the prompts that are less so
OUT = 0  # the first of the groups between them: out of the profile


@dataclass(frozen=True, slots=True)
class ProfiledPrompt:
    """What a user said in one turn, and the source of the data that it is from."""

    text: str
    source: str


@dataclass(frozen=True)
class Model:
    """What was learned: `counts` int64 [sources, PLACES], how many of `texts` [sources] have each place; `centres` of
    the topics; `ends` of the groups by length, in words, and for each group the borders between LEVELS in `surprise`.

    `learned` uint32 [texts]: the digest of each, `source_of` its source. Live prompts may be among them (a button, a
    form, the examples of a manual), and are looked at as if they had not been learned: nothing is as usual as itself.
    """

    sources: tuple[str, ...]
    texts: NDArray[np.int64]
    counts: NDArray[np.int64]
    learned: NDArray[np.uint32]
    source_of: NDArray[np.uint8]
    centres: NDArray[np.float32]
    ends: NDArray[np.int64]
    borders: NDArray[np.float64]

    def topics(self, features: Features) -> NDArray[np.int64]:
        """[n] the topic of each text, 0 to `len(centres)`."""
        weights = rarity(self.counts.sum(axis=0), int(self.texts.sum()))
        return topic_of(features, weights, self.centres)

    def surprise(self, features: Features) -> NDArray[np.float64]:
        """[n] bits that each word and pair of a text takes on average, by how many learned texts have it."""
        return _surprise(features, self.counts.sum(axis=0), np.isin(features.digests, self.learned))

    def typical(self, features: Features) -> NDArray[np.int64]:
        """[n] how typical each text is among those of its length: 0 (`OUT`) to len(LEVELS)."""
        borders = self.borders[_group(features, self.ends)]
        return np.asarray((self.surprise(features)[:, None] <= borders).sum(axis=1), dtype=np.int64)

    def likely_sources(self, features: Features) -> NDArray[np.int64]:
        """[n] the source whose words each text uses (naive Bayes over its places)."""
        known = [np.isin(features.digests, self.learned[self.source_of == i]) for i in range(len(self.sources))]
        bits = [_bits(features, *one) for one in zip(self.counts, known, strict=True)]
        prior = np.log2(np.maximum(self.texts, 1) / max(1, int(self.texts.sum())))
        return np.asarray(np.argmin(np.array(bits) - prior[:, None], axis=0), dtype=np.int64)


@dataclass(frozen=True)
class Measured:
    """How many prompts have each topic, are like each source, are how typical: of prompts the model did not learn."""

    topics: NDArray[np.int64]
    sources: NDArray[np.int64]
    typical: NDArray[np.int64]

    @classmethod
    def of(cls, model: Model, features: Features) -> Measured:
        return cls(
            np.bincount(model.topics(features), minlength=len(model.centres) + 1),
            np.bincount(model.likely_sources(features), minlength=len(model.sources)),
            np.bincount(model.typical(features), minlength=len(LEVELS) + 1),
        )


@dataclass(frozen=True)
class Profile:
    """Counts of `prompts` prompts, those of `measured` without the third that taught the model.

    `words` int64 [WORDS]: how many prompts have each place. `answers`: `evals.live.AnswerCounts` of the release's own
    answers to held-out prompts, as plain values.
    """

    prompts: int
    by_source: dict[str, int]
    lengths: dict[int, int]
    languages: dict[str, int]
    words: NDArray[np.int64]
    model: Model
    measured: Measured
    answers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Profile:
        """The profile in a file. Raises DataError where it is none, or one of another version."""
        if not path.is_file():
            raise DataError(f"{path}: given no file, required the profile of a release; publish writes it")
        found = read_json(path)
        versions = (found.get("format"), found.get("features")) if isinstance(found, dict) else None
        if versions != (PROFILE_FORMAT, FEATURES_VERSION):
            required = f"format {PROFILE_FORMAT} with features {FEATURES_VERSION}; publish the release again"
            raise DataError(f"{path}: given no profile that this version can compare with, required {required}")
        return cls.from_json(found)

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain values; the large tables are packed."""
        model = self.model
        return {
            "format": PROFILE_FORMAT,
            "features": FEATURES_VERSION,
            "prompts": self.prompts,
            "by_source": self.by_source,
            "lengths": {str(key): count for key, count in self.lengths.items()},
            "languages": self.languages,
            "measured": {name: counts.tolist() for name, counts in vars(self.measured).items()},
            "answers": self.answers,
            "words": _packed(self.words, "<u4"),
            "model": {
                "sources": list(model.sources),
                "texts": model.texts.tolist(),
                "ends": model.ends.tolist(),
                "borders": model.borders.tolist(),
                "counts": _packed(model.counts, "<u4"),
                "centres": _packed(model.centres, "<f4"),
                "learned": _packed(model.learned, "<u4"),
                "source_of": _packed(model.source_of, "|u1"),
            },
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Profile:
        model = found["model"]
        return cls(
            prompts=found["prompts"],
            by_source=found["by_source"],
            lengths={int(key): count for key, count in found["lengths"].items()},
            languages=found["languages"],
            words=_unpacked(found["words"]).astype(np.int64),
            model=Model(
                sources=tuple(model["sources"]),
                texts=np.array(model["texts"], dtype=np.int64),
                counts=_unpacked(model["counts"]).astype(np.int64),
                centres=_unpacked(model["centres"]).astype(np.float32),
                learned=_unpacked(model["learned"]),
                source_of=_unpacked(model["source_of"]),
                ends=np.array(model["ends"], dtype=np.int64),
                borders=np.array(model["borders"], dtype=np.float64),
            ),
            measured=Measured(**{name: np.array(counts, dtype=np.int64) for name, counts in found["measured"].items()}),
            answers=found["answers"],
        )


def profile_of(prompts: Iterable[ProfiledPrompt], answers: Mapping[str, Any] | None = None) -> Profile:
    """The profile of prompts, in whatever order they come; of more than `MOST_PROMPTS`, that of a fixed choice of them.

    Raises DataError for fewer than `LEAST_PROMPTS`.
    """
    chosen = sorted(prompts, key=lambda one: digest(f"{one.source}\0{one.text}"))[:MOST_PROMPTS]
    if len(chosen) < LEAST_PROMPTS:
        raise DataError(
            f"profile: given {len(chosen)} prompts, required at least {LEAST_PROMPTS} to say what prompts look like"
        )
    profile = profile_from(features_of([one.text for one in chosen]), [one.source for one in chosen])
    return replace(profile, answers=dict(answers or {}))


def profile_from(features: Features, sources: Sequence[str]) -> Profile:
    """The profile of prompts that have been counted, and the source of each, without answers."""
    names = sorted({*sources})
    of = np.array([names.index(source) for source in sources])
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(features))
    third = int(len(features) * LEARNED)
    model = _learned(features.take(shuffled[:third]), of[shuffled[:third]], names, rng)
    return Profile(
        prompts=len(features),
        by_source=dict(sorted(Counter(sources).items())),
        lengths=length_counts(features.lengths),
        languages=dict(sorted(Counter(features.languages).items())),
        words=features.counts()[:WORDS],
        model=model,
        measured=Measured.of(model, features.take(shuffled[third:])),
    )


def length_counts(lengths: NDArray[np.int64]) -> dict[int, int]:
    """How many lengths, in words, fall into each `style.bucket`."""
    return dict(sorted(Counter(bucket(int(length)) for length in lengths).items()))


def _learned(features: Features, sources: NDArray[np.int64], names: Sequence[str], rng: np.random.Generator) -> Model:
    counts = np.stack([features.take(np.flatnonzero(sources == i)).counts() for i in range(len(names))])
    weights = rarity(counts.sum(axis=0), len(features))
    groups = min(LENGTH_GROUPS, max(1, len(features) // TEXTS_OF_GROUP))
    parts = np.quantile(features.lengths, [i / groups for i in range(1, groups)], method="lower")
    ends = np.unique(parts.astype(np.int64))
    return Model(
        sources=tuple(names),
        texts=np.bincount(sources, minlength=len(names)),
        counts=counts,
        learned=features.digests,
        source_of=sources.astype(np.uint8),
        centres=topics(features, weights, TOPICS, rng),
        ends=ends,
        borders=_borders(features, counts.sum(axis=0), ends),
    )


def _borders(features: Features, counts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """[groups, levels] in surprise, the largest first; each text is measured by what the others teach."""
    surprise, group = _surprise(features, counts, np.ones(len(features), dtype=bool)), _group(features, ends)
    levels = [1 - level for level in LEVELS]
    groups = [surprise[group == i] for i in range(len(ends) + 1)]
    return np.array([np.quantile(one if len(one) else surprise, levels) for one in groups])


def _group(features: Features, ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(ends, features.lengths)


def _surprise(features: Features, counts: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean bits a place; 0 for a text without a word."""
    return _bits(features, counts, known) / np.maximum(np.diff(features.offsets), 1)


def _bits(features: Features, counts: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[n] bits that the places of each text take; `known` [n]: the text itself is in the counts, and is taken out."""
    sizes, rows = np.diff(features.offsets), features.rows()
    totals = counts.sum() - known * sizes + SMOOTHING * PLACES
    logs = np.log2(np.maximum(counts[features.places] - known[rows], 0) + SMOOTHING)
    return np.asarray(sizes * np.log2(totals) - np.bincount(rows, weights=logs, minlength=len(features)))


def _packed(values: NDArray[Any], kind: str) -> dict[str, Any]:
    data = zlib.compress(np.ascontiguousarray(values, dtype=kind).tobytes(), 9)
    return {"type": kind, "shape": list(values.shape), "zlib": base64.b64encode(data).decode("ascii")}


def _unpacked(found: Mapping[str, Any]) -> NDArray[Any]:
    data = zlib.decompress(base64.b64decode(found["zlib"]))
    return np.frombuffer(data, dtype=found["type"]).reshape(found["shape"])
