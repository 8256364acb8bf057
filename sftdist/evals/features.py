"""What is counted of a text where texts of two times are compared: its length, its language, hashes of its words.

Nothing here can be read back: words become places in tables in which several words share a place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftdist.data.keys import digest
from sftdist.data.language import language_of
from sftdist.data.near import SPREAD, grams
from sftdist.data.near import words as word_hashes

FEATURES_VERSION = 1  # grows when the same text is counted otherwise: profiles made before cannot be compared then
WORD_BITS, PAIR_BITS = 14, 15
WORDS, PAIRS = 1 << WORD_BITS, 1 << PAIR_BITS  # places of single words, and after them of two words in a row
PLACES = WORDS + PAIRS
UNKNOWN = "unknown"  # the language of code, of names, of very short texts
_DIGIT = re.compile(r"\d")


@dataclass(frozen=True)
class Features:
    """Of n texts: `lengths` int64 [n] in words, `languages` [n], `digests` uint32 [n], and the places of each text's
    words and pairs.

    Text i has the places `places[offsets[i]:offsets[i + 1]]` (ascending, each once): below `WORDS` those of words,
    above those of pairs.
    """

    lengths: NDArray[np.int64]
    languages: list[str]
    digests: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    places: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self) -> NDArray[np.int64]:
        """The text that each entry of `places` belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take(self, texts: NDArray[np.int64]) -> Features:
        """The features of some texts, in that order."""
        sizes = np.diff(self.offsets)[texts]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        source = np.repeat(self.offsets[texts] - offsets[:-1], sizes) + np.arange(offsets[-1])
        languages = [self.languages[i] for i in texts]
        return Features(self.lengths[texts], languages, self.digests[texts], offsets, self.places[source])

    def counts(self) -> NDArray[np.int64]:
        """[PLACES]: how many texts have each place."""
        return np.bincount(self.places, minlength=PLACES)


def features_of(texts: Sequence[str]) -> Features:
    """Count texts; about 0.2 ms each. Numbers of as many digits are one word."""
    hashes = [_hashes(text) for text in texts]
    places = [np.unique(np.concatenate([_words_in(one), _pairs_in(one)])) for one in hashes]
    return Features(
        lengths=np.array([len(one) for one in hashes], dtype=np.int64),
        languages=[language_of(text) or UNKNOWN for text in texts],
        digests=np.array([int.from_bytes(digest(text)[:4], "little") for text in texts], dtype=np.uint32),
        offsets=np.concatenate([[0], np.cumsum([len(one) for one in places], dtype=np.int64)]),
        places=np.concatenate([np.empty(0, dtype=np.int32), *places]).astype(np.int32),
    )


def word_places(text: str) -> NDArray[np.int32]:
    """The place of each word of a text, in their order."""
    return _words_in(_hashes(text))


def _hashes(text: str) -> NDArray[np.uint64]:
    return word_hashes(_DIGIT.sub("0", text))


def _words_in(hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
    return ((hashes * SPREAD) >> np.uint64(64 - WORD_BITS)).astype(np.int32)


def _pairs_in(hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
    found = (grams(hashes, 2) * SPREAD) >> np.uint64(64 - PAIR_BITS)
    return (found + np.uint64(WORDS)).astype(np.int32)
