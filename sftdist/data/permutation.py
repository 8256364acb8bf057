"""Seeded permutations that are computed, not stored.

A Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains") permutes [0, N): the row at place p of pass k costs a few multiplications, whatever N is.
Nothing is ever materialised, so a source of 10^8 rows is neither permuted nor read as a whole, a
position is one integer, and unlike with a permutation in blocks any row can follow any other.
Plain 64-bit arithmetic: the order is the same on every machine and with every numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ROUNDS = 6
MIN_BITS = 6  # a network over 2 or 4 values has too few permutations


def hash64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit numbers."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key64(*numbers: int) -> int:
    """One 64-bit key out of several integers."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = hash64(key * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number % (1 << 64)) + np.uint64(1))
    return int(key[0])


def shuffled(count: int, key: int) -> Ints:
    """A permutation of `count` numbers that depends on `key` alone, on every machine and numpy."""
    return np.argsort(hash64(np.arange(count, dtype=np.uint64) + np.uint64(key)), kind="stable")


def _network(x: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """Alternating Feistel network over [0, 2^bits): a bijection for each key."""
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    left, right = x >> low, x & low_mask
    for number in range(ROUNDS):
        keys = keys + np.uint64(0x9E3779B97F4A7C15)
        if number % 2:
            right = right ^ (hash64(left ^ keys) & low_mask)
        else:
            left = left ^ (hash64(right ^ keys) & high_mask)
    return (left << low) | right


def permute(draws: Ints, size: int, key: int) -> Ints:
    """Row of draw number n: position n % size in the permutation of pass n // size.

    `draws` int64 [n] counts from 0 over all passes; returns int64 [n] in [0, size).
    """
    bits = max(MIN_BITS, int(size - 1).bit_length())
    keys = hash64((draws // size).astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + np.uint64(key))
    out = _network((draws % size).astype(np.uint64), keys, bits)
    while (outside := np.flatnonzero(out >= np.uint64(size))).size:  # cycle walking: at most 2 rounds in the mean
        out[outside] = _network(out[outside], keys[outside], bits)
    return out.astype(np.int64)
