"""What texts are about, without an embedding: groups of texts with the same words.

Spherical k-means (Dhillon and Modha, "Concept decompositions for large sparse text data using clustering", Machine
Learning 42, 2001) over hashed words, rare ones weighing more; the seeds are drawn as in k-means++ (Arthur and
Vassilvitskii, SODA 2007).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sftdist.evals.features import WORD_BITS, WORDS, Features

TOPIC_BITS = 10
TOPIC_PLACES = 1 << TOPIC_BITS
ROUNDS = 25
BLOCK = 4096  # texts whose vectors are in memory at once

Vectors = NDArray[np.float32]


def rarity(counts: NDArray[np.int64], texts: int) -> Vectors:
    """[TOPIC_PLACES] the weight of each place: ln((1 + n) / (1 + texts that have it)), never below 0."""
    folded = counts[:WORDS].reshape(TOPIC_PLACES, -1).sum(axis=1)
    return np.log((1 + texts) / (1 + np.minimum(folded, texts))).astype(np.float32)


def topics(features: Features, weights: Vectors, number: int, rng: np.random.Generator) -> Vectors:
    """[<= number, TOPIC_PLACES] the middle of each topic, of length 1. Empty topics are left out."""
    vectors = _vectors(features, weights)
    centres = _seeds(vectors, number, rng)
    nearest = np.full(len(vectors), -1)
    for _ in range(ROUNDS):
        before, nearest = nearest, np.argmax(vectors @ centres.T, axis=1)
        if np.array_equal(before, nearest):
            break
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, vectors)
        used = np.bincount(nearest, minlength=len(centres)) > 0
        centres, nearest = _unit(sums[used]), (np.cumsum(used) - 1)[nearest]
    return centres


def topic_of(features: Features, weights: Vectors, centres: Vectors) -> NDArray[np.int64]:
    """The number of each text's topic; the last, `len(centres)`, is that of texts without a word that tells."""
    found = np.empty(len(features), dtype=np.int64)
    for start in range(0, len(features), BLOCK):
        part = np.arange(start, min(start + BLOCK, len(features)))
        likeness = _vectors(features.take(part), weights) @ centres.T
        found[part] = np.where(likeness.max(axis=1, initial=0) > 0, likeness.argmax(axis=1), len(centres))
    return found


def places_of(topic_place: int) -> range:
    """The places of `WORDS` that share one of `TOPIC_PLACES`."""
    width = WORDS // TOPIC_PLACES
    return range(topic_place * width, (topic_place + 1) * width)


def _vectors(features: Features, weights: Vectors) -> Vectors:
    words = features.places < WORDS
    places = features.places[words] >> (WORD_BITS - TOPIC_BITS)
    found = np.zeros((len(features), TOPIC_PLACES), dtype=np.float32)
    found[features.rows()[words], places] = weights[places]
    return _unit(found)


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def _seeds(vectors: Vectors, number: int, rng: np.random.Generator) -> Vectors:
    """Texts that are far from one another."""
    centres = [vectors[rng.integers(len(vectors))]]
    far = np.ones(len(vectors))
    while len(centres) < number:
        far = np.minimum(far, np.maximum(0, 1 - vectors @ centres[-1]) ** 2)
        if not far.sum() > 1e-9:
            break
        centres.append(vectors[rng.choice(len(vectors), p=far / far.sum())])
    return np.array(centres)
