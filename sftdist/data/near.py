"""Near duplicates: MinHash signatures of word shingles, and the pairs of signatures that are alike.

Broder (1997) for the signature, Li and König, "b-Bit Minwise Hashing" (WWW 2010) for keeping 16 bits of each minimum,
Bawa et al., "LSH Forest" (WWW 2005) for looking at neighbours in sorted order. The permutations are datasketch's
`affine32`; they are applied here, for its own loop over Python integers takes five times as long.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from sftdist.data.schema import Conversation, Message

NEAR_VERSION = 2  # goes up when the same text gets another signature
PERMUTATIONS = 128
EMPTY = 0xFFFF  # all values of a signature without a shingle
REACH = 32  # with how many neighbours a row is compared in each band
ROUNDS = 4  # how often rows in crowded bands are gone through again
BLOCK = 1024  # shingles, of which all permutations are in memory at once
PAIRS = 16_384  # pairs of signatures, likewise
PROMPT_THRESHOLD = 0.8
MISSED = 0.001  # of the pairs that are just near, because none of their bands is equal
COMMON_SHARE, COMMON_ROWS = 0.05, 50  # what is in more of the rows is a template, not what a row says

# What a character is in a text: between words, in one, a word by itself, a word by itself between two words.
SEPARATOR, LETTER, ALONE, OPERATOR = range(4)
OPERATORS = "+-*/=<>#%^&|~×÷−±≤≥≠"  # noqa: RUF001 - "12 + 7" is not "12 - 7"
SUFFIXES = [ord("+"), ord("#")]  # also at the end of a word: C++ and C# are not C
DASHES = [ord("-"), 0x2212]  # only between digits; elsewhere they join words, or are a dash
# Scripts that put no space between words (code points, both ends included).
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x30FF),  # radicals, ideographic marks, kana
    (0x3100, 0x312F),  # bopomofo
    (0x31A0, 0x31FF),  # bopomofo, strokes and kana, extended
    (0x3400, 0x9FFF),  # ideographs
    (0xF900, 0xFAFF),  # ideographs, compatible
    (0x1AFF0, 0x1B16F),  # kana, extended
    (0x20000, 0x3FFFF),  # ideographs, extended
)
LETTER_BASE, WORD_BASE, SPREAD = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93))

Signature = NDArray[np.uint16]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Near:
    """When two texts are near: at least `threshold` of their `shingle` words in a row in common (Jaccard, estimated).

    The estimate is the share of equal values of two signatures. Its standard deviation is at most 0.045 (0.035 at
    0.8); what 16 bits instead of 32 add to it is below 2e-5, so it is not corrected.
    """

    threshold: float
    shingle: int

    @property
    def least_equal(self) -> int:
        """How many of the `PERMUTATIONS` values of two near signatures are equal, at least."""
        return max(1, math.ceil(self.threshold * PERMUTATIONS - 1e-9))

    @property
    def of_prompts(self) -> Near:
        """Prompts are short, and often ask different things with the same words: their threshold is at least 0.8."""
        return Near(max(self.threshold, PROMPT_THRESHOLD), self.shingle)

    def bands(self) -> list[slice]:
        """The columns of each band: as few bands as miss at most `MISSED` of the pairs at the threshold."""
        return _bands_that_miss(PERMUTATIONS - self.least_equal)


@cache
def _bands_that_miss(unequal: int) -> list[slice]:
    """Bands of `PERMUTATIONS` columns for pairs with so many unequal values; with one band more than those, no pair
    can be missed."""
    for number in range(1, unequal + 2):
        edges = [PERMUTATIONS * i // number for i in range(number + 1)]
        if share_missed([end - start for start, end in pairwise(edges)], unequal) <= MISSED:
            break
    return [slice(start, end) for start, end in pairwise(edges)]


def share_missed(widths: Sequence[int], unequal: int) -> float:
    """The share of all ways to place the unequal values that leaves no band equal, by counting them exactly."""
    ways = [1]  # ways[k]: to place k values so that each band so far has at least one
    for width in widths:
        more = [0] * (len(ways) + width)
        for placed, before in enumerate(ways):
            for here in range(1, width + 1):
                more[placed + here] += before * math.comb(width, here)
        ways = more
    return ways[unequal] / math.comb(sum(widths), unequal) if unequal < len(ways) else 0.0


# --- signatures -----------------------------------------------------------------------------------------


def signatures(conversations: Sequence[Conversation], near: Near) -> Signature:
    """[n, 2, 128]: [:, 0] of everything but the system prompt (which many rows share), [:, 1] of the prompt alone."""
    found = np.empty((len(conversations), 2, PERMUTATIONS), dtype=np.uint16)
    found[:, 0] = text_signatures([whole_text(conversation) for conversation in conversations], near)
    found[:, 1] = text_signatures([prompt_text(conversation) for conversation in conversations], near)
    return found


def text_signatures(texts: Sequence[str], near: Near) -> Signature:
    """[n, 128]: the low 16 bits of the least value of all shingles under each permutation; `EMPTY` without a word."""
    found = np.full((len(texts), PERMUTATIONS), EMPTY, dtype=np.uint16)
    for row, text in enumerate(texts):
        hashes = shingle_hashes(words(text), near.shingle)
        if len(hashes):
            found[row] = _minima(hashes).astype(np.uint16)  # the low bits: the high ones of a minimum are mostly zero
    return found


def whole_text(conversation: Conversation) -> str:
    """What is said and done in the user, assistant and tool turns."""
    return "\n".join(
        text for m in conversation.messages if m.role in ("user", "assistant", "tool") for text in _texts(m) if text
    )


def prompt_text(conversation: Conversation) -> str:
    """What the user says before the first answer."""
    texts: list[str] = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        if message.role == "user":
            texts.append(message.content)
    return "\n".join(texts)


def _texts(m: Message) -> tuple[str, ...]:
    calls = json.dumps(list(m.tool_calls), ensure_ascii=False) if m.tool_calls else ""
    return (m.reasoning or "", m.content, calls)


def words(text: str) -> NDArray[np.uint64]:
    """A hash of each word of a text: letters, digits and marks in a row, without case and width; a character of a
    script that is written without spaces is a word by itself, and so is an operator between two words. Punctuation and
    other symbols only separate."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text.casefold())
    folded = folded.replace("'", "").replace("’", "")  # noqa: RUF001 - both apostrophes: don't is dont
    points = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = _in_place(points, _kinds(128 if folded.isascii() else 0x110000)[points])
    inside = kinds != SEPARATOR
    starts = inside.copy()
    starts[1:] &= (kinds[1:] == ALONE) | (kinds[:-1] != LETTER)
    points, first = points[inside], np.flatnonzero(starts[inside])
    if not len(first):
        return np.empty(0, dtype=np.uint64)
    lengths = np.diff(first, append=len(points))
    place = np.arange(len(points)) - np.repeat(first, lengths)
    terms = (points + np.uint64(1)) * _powers(LETTER_BASE, int(lengths.max()))[place]
    return np.add.reduceat(terms, first)


def _in_place(points: NDArray[np.uint32], kinds: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Kinds in which each operator is a word or a separator, by what stands around it; one blank does not count. So
    the marks of Markdown at the begin of a line, and pairs of them, stay separators."""
    at = np.flatnonzero(kinds == OPERATOR)
    if not len(at):
        return kinds
    blank, is_word, is_digit = np.zeros((3, len(points) + 4), dtype=bool)
    blank[2:-2] = points == ord(" ")
    is_word[2:-2] = (kinds == LETTER) | (kinds == ALONE)
    is_digit[2:-2] = (points >= ord("0")) & (points <= ord("9"))
    before, after = at + 1, at + 3
    before, after = before - blank[before], after + blank[after]
    between = is_word[before] & is_word[after]
    between &= ~np.isin(points[at], DASHES) | (is_digit[before] & is_digit[after])
    suffix = is_word[at + 1] & np.isin(points[at], SUFFIXES)
    kinds[at] = np.where(between | suffix, ALONE, SEPARATOR)
    return kinds


def shingle_hashes(hashes: NDArray[np.uint64], size: int) -> NDArray[np.uint32]:
    """A hash of each `size` words in a row; of a shorter text, one of all its words."""
    return ((grams(hashes, min(size, len(hashes))) * SPREAD) >> np.uint64(32)).astype(np.uint32)


def grams(hashes: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """64 bits for each `size` words in a row; none for a shorter text or a size of 0."""
    if not 0 < size <= len(hashes):
        return np.empty(0, dtype=np.uint64)
    number = len(hashes) - size + 1
    mixed = hashes ^ (hashes >> np.uint64(32))
    powers = _powers(WORD_BASE, size)
    total = np.zeros(number, dtype=np.uint64)
    for j in range(size):
        total += mixed[j : j + number] * powers[j]
    return total


def _minima(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """What `datasketch.MinHash.update_batch` leaves in `hashvalues` for these hashes."""
    a, b = _permutations()
    mixed = _murmur(hashes)
    blocks = (mixed[start : start + BLOCK, None] * a + b for start in range(0, len(mixed), BLOCK))
    return np.minimum.reduce([block.min(axis=0) for block in blocks])


def _murmur(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The last step of MurmurHash3: close hashes must not stay close, for an affine permutation keeps that."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


@cache
def _permutations() -> NDArray[np.uint32]:
    return np.asarray(MinHash(PERMUTATIONS, seed=1, scheme="affine32").permutations, dtype=np.uint32)


def _powers(base: np.uint64, number: int) -> NDArray[np.uint64]:
    """At least `number` powers of an odd base, modulo 2^64."""
    return _powers_of_two(base, max(6, number.bit_length()))


@cache
def _powers_of_two(base: np.uint64, exponent: int) -> NDArray[np.uint64]:
    return np.multiply.accumulate(np.full(2**exponent, base, dtype=np.uint64))


@cache
def _kinds(count: int) -> NDArray[np.uint8]:
    """What each of so many code points is; made once, of all of them in about 0.2 s."""
    kinds = np.array([unicodedata.category(chr(point))[0] in "LMN" for point in range(count)], dtype=np.uint8)
    for start, end in UNSPACED:
        kinds[start : end + 1] *= ALONE
    kinds[[ord(character) for character in OPERATORS if ord(character) < count]] = OPERATOR
    return kinds


# --- pairs ------------------------------------------------------------------------------------------------


def near_twins(signatures: Signature, near: Near, rows: Rows | None = None) -> Rows:
    """For each row of [n, 128] the first row before it that it was found near to, or -1; following them leads to the
    first of a group.

    Only `rows` (ascending) are compared, where given. Signatures may be a memory map: of it one band is in memory at
    a time, 30 to 60 bytes a row. Of near pairs at most `MISSED` are missed where at most `REACH` + 1 rows share a band;
    in more crowded bands a row is compared with the `REACH` before it in the sorted order of the rest of the signature,
    so that templated data takes no longer than other data.
    """
    none = len(signatures)
    twin = np.full(none, none, dtype=np.int64)
    left = _not_empty(signatures, np.arange(none) if rows is None else rows)
    common = common_shingles(signatures, left)
    left = _apart_from_equals(signatures, left, twin)
    for _ in range(ROUNDS):
        crowded = _compare_neighbours(signatures, near, left, twin, common)
        again = left[crowded & (twin[left] == none)]
        # Rows of one crowd find different earlier ones: those that stay are compared once more, among themselves.
        if len(again) < 2 or not np.any(crowded & (twin[left] != none)):
            break
        left = again
    return np.where(twin == none, -1, twin)


def near_of(
    a: Signature, b: Signature, near: Near, *, rows: Rows | None = None, common: NDArray[np.bool_] | None = None
) -> Rows:
    """For each row of `a` [n, 128] a row of `b` [m, 128] that it was found near to, or -1; crowded bands as above.

    Only `rows` of `a` are compared, where given. `common`: the common shingles, by default those of `a` and of `b`.
    """
    none = len(b)
    found = np.full(len(a), none, dtype=np.int64)
    of_a, of_b = _not_empty(a, np.arange(len(a)) if rows is None else rows), _not_empty(b, np.arange(len(b)))
    if common is None:
        common = common_shingles(a, of_a) | common_shingles(b, of_b)
    of_b = _apart_from_equals(b, of_b, np.full(none, none, dtype=np.int64))
    if not len(of_b):
        return np.full(len(a), -1, dtype=np.int64)
    _note_equals(a, of_a, b, of_b, found)
    for band, rest in _bands(near):
        of_a = of_a[found[of_a] == none]
        left = of_a[_is_telling(a, of_a, band, common)]
        right = of_b[_is_telling(b, of_b, band, common)]
        order, runs = _sorted_by_band(partial(_end_to_end, b, right, a, left), band, rest)
        is_b = order < len(right)
        sorted_b, runs_b = order[is_b], runs[is_b]
        before = np.cumsum(is_b)[~is_b]  # rows of b that stand before each row of a
        place_a, runs_a = left[order[~is_b] - len(right)], runs[~is_b]
        for place in range(-REACH // 2, REACH // 2):
            at = before + place
            here = (at >= 0) & (at < len(sorted_b)) & (found[place_a] == none)
            here[here] &= runs_b[at[here]] == runs_a[here]
            one, other = place_a[here], right[sorted_b[at[here]]]
            alike = _are_near(a, one, b, other, near, common)
            found[one[alike]] = other[alike]
    return np.where(found == none, -1, found)


def _compare_neighbours(
    signatures: Signature, near: Near, rows: Rows, twin: Rows, common: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Note the twins among neighbours in each band; the result [rows] is true where a band has more than are seen."""
    crowded = np.zeros(len(rows), dtype=bool)
    for band, rest in _bands(near):
        here = rows[_is_telling(signatures, rows, band, common)]
        order, runs = _sorted_by_band(partial(_columns, signatures, here), band, rest)
        place = np.arange(len(order)) - np.searchsorted(runs, runs)  # in its run
        size = np.bincount(runs, minlength=1)[runs]
        crowded[np.searchsorted(rows, here[order[size > REACH + 1]])] = True
        at = np.flatnonzero(place)
        for distance in range(1, REACH + 1):
            at = at[place[at] >= distance]
            if not len(at):
                break
            one, other = here[order[at - distance]], here[order[at]]
            early, late = np.minimum(one, other), np.maximum(one, other)
            new = twin[late] == len(twin)
            early, late = early[new], late[new]
            alike = _are_near(signatures, early, signatures, late, near, common)
            np.minimum.at(twin, late[alike], early[alike])
    return crowded


def _bands(near: Near) -> Iterator[tuple[slice, list[int]]]:
    """Each band, and the columns that order the rows of a crowded one: those that follow, round the end."""
    for band in near.bands():
        yield band, [(band.stop + i) % PERMUTATIONS for i in range(min(24, PERMUTATIONS - (band.stop - band.start)))]


def _is_telling(signatures: Signature, rows: Rows, band: slice, common: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a row has anything in a band that is not common: without, the band puts all of a template together."""
    telling = [np.any(~common[_shingle_ids(signatures[part, band], band)], axis=1) for part in _parts(rows)]
    return np.concatenate([np.empty(0, dtype=bool), *telling])


def _sorted_by_band(columns: Callable[[slice | int], Signature], band: slice, rest: list[int]) -> tuple[Rows, Rows]:
    """Places of rows so that those with an equal band stand together (in a run), and the number of each one's run."""
    keys = _key(columns(band))
    order = np.argsort(keys, kind="stable")
    starts = np.empty(len(keys), dtype=bool)
    starts[:1] = True
    starts[1:] = keys[order[1:]] != keys[order[:-1]]
    runs = np.cumsum(starts) - 1
    crowded = np.flatnonzero(np.bincount(runs, minlength=1)[runs] > REACH // 2)
    if len(crowded):
        few = order[crowded]
        following = [columns(column)[few] for column in reversed(rest)]
        order[crowded] = few[np.lexsort((*following, runs[crowded]))]
    return order, runs


def _columns(signatures: Signature, rows: Rows, at: slice | int) -> Signature:
    return signatures[rows, at]


def _end_to_end(a: Signature, of_a: Rows, b: Signature, of_b: Rows, at: slice | int) -> Signature:
    return np.concatenate([a[of_a, at], b[of_b, at]])


def _key(columns: Signature) -> NDArray[np.uint64]:
    """A hash of each row of some columns; whether the signatures are alike is looked at afterwards."""
    keys = np.zeros(len(columns), dtype=np.uint64)
    for column in columns.T:
        keys = (keys ^ column) * SPREAD
        keys ^= keys >> np.uint64(32)
    return keys


def _note_equals(a: Signature, of_a: Rows, b: Signature, of_b: Rows, found: Rows) -> None:
    """Equal signatures, of which every value may be common."""
    keys_a, keys_b = _keys(a, of_a), _keys(b, of_b)
    order = np.argsort(keys_b, kind="stable")
    at = order[np.minimum(np.searchsorted(keys_b, keys_a, sorter=order), len(order) - 1)]
    equal = keys_b[at] == keys_a
    found[of_a[equal]] = of_b[at[equal]]


def _keys(signatures: Signature, rows: Rows) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, np.uint64), *(_key(signatures[part]) for part in _parts(rows))])


def _apart_from_equals(signatures: Signature, rows: Rows, twin: Rows) -> Rows:
    """The rows without those whose whole signature an earlier one has (noted as its twin): any number of equal rows
    then counts as one."""
    _, first, which = np.unique(_keys(signatures, rows), return_index=True, return_inverse=True)
    equal = first[which] != np.arange(len(rows))
    twin[rows[equal]] = rows[first[which[equal]]]
    return rows[~equal]


def _not_empty(signatures: Signature, rows: Rows) -> Rows:
    found = [np.any(signatures[part] != EMPTY, axis=1) for part in _parts(rows)]
    return rows[np.concatenate([np.empty(0, dtype=bool), *found])]


def _are_near(
    a: Signature, one: Rows, b: Signature, other: Rows, near: Near, common: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether row one[i] of `a` is near to row other[i] of `b`, with and without the common shingles."""
    found = [_alike(a[left], b[right], near, common) for left, right in zip(_parts(one), _parts(other), strict=True)]
    return np.concatenate([np.empty(0, dtype=bool), *found])


def _alike(a: Signature, b: Signature, near: Near, common: NDArray[np.bool_]) -> NDArray[np.bool_]:
    equal = a == b
    count = np.count_nonzero(equal, axis=1)
    alike = count >= near.least_equal
    maybe = np.flatnonzero(alike & (count < PERMUTATIONS))
    equal, common_a, common_b = equal[maybe], common[_shingle_ids(a[maybe])], common[_shingle_ids(b[maybe])]
    # Two texts with the same template differ in what is not common: an equal value of a common shingle says nothing.
    shared = np.count_nonzero(equal & ~common_a, axis=1)
    apart = np.count_nonzero(~equal & ~(common_a & common_b), axis=1)
    alike[maybe] = (shared > 0) & (shared >= near.threshold * (shared + apart) - 1e-9)
    return alike


def common_shingles(signatures: Signature, rows: Rows) -> NDArray[np.bool_]:
    """[65536] over some rows, none of them empty: which 16-bit ids are of shingles that so many of them have that they
    are a template."""
    counts = np.zeros(2**16, dtype=np.int64)
    for part in _parts(rows):
        ids = np.sort(_shingle_ids(signatures[part]), axis=1)
        counts += np.bincount(ids[:, 0], minlength=2**16)
        counts += np.bincount(ids[:, 1:][ids[:, 1:] != ids[:, :-1]], minlength=2**16)
    return counts > max(COMMON_ROWS, COMMON_SHARE * len(rows))


def _shingle_ids(values: Signature, columns: slice = slice(None)) -> Signature:
    """Which shingle each value of these columns of signatures stands for, by the low 16 bits of its hash: an affine
    permutation modulo 2^32 is one of the low 16 bits, too, and can be undone."""
    b, inverse = _inverse()
    return (values - b[columns]) * inverse[columns]


@cache
def _inverse() -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    a, b = _permutations()
    return b.astype(np.uint16), np.array([pow(int(factor), -1, 2**16) for factor in a], dtype=np.uint16)


def _parts(rows: Rows) -> Iterator[Rows]:
    return (rows[start : start + PAIRS] for start in range(0, len(rows), PAIRS))
