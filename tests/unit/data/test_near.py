"""Signatures and near pairs: words, the estimate, no pair missed, no blow-up, no template taken for text."""

from __future__ import annotations

import time
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sftdist.data import near as near_module
from sftdist.data.near import (
    EMPTY,
    PERMUTATIONS,
    Near,
    Rows,
    common_shingles,
    near_of,
    near_twins,
    prompt_text,
    share_missed,
    shingle_hashes,
    signatures,
    text_signatures,
    whole_text,
    words,
)
from sftdist.data.schema import Conversation, Message

NEAR = Near(0.8, 3)
Array = NDArray[np.uint16]


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation("x", tuple(Message(role, text) for role, text in turns))


def prose(seed: int, count: int, vocabulary: int = 5000) -> list[str]:
    return [f"w{number}" for number in np.random.default_rng(seed).integers(vocabulary, size=count)]


def alike(rows: int, unequal: int, seed: int = 0) -> Array:
    """One random signature, of which each row has `unequal` values of its own."""
    random = np.random.default_rng(seed)
    found = np.tile(random.integers(2**16, size=PERMUTATIONS, dtype=np.uint16), (rows, 1))
    for row in range(rows):
        found[row, random.choice(PERMUTATIONS, unequal, replace=False)] = random.integers(2**16, size=unequal)
    return found


# --- what a text says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"),
        ("It's   so:\n\n- one\n- two", "its so one two"),
        ("STRASSE", "straße"),
        ("\uff26ull\u3000width \uff11\uff12", "full width 12"),
        ("cafe\u0301", "café"),
        ("a“quoted”b", 'a "quoted" b'),
    ],
)
def test_case_width_and_punctuation_do_not_count(one: str, other: str) -> None:
    assert words(one).tolist() == words(other).tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [("12 + 7", "12 - 7"), ("12 * 7", "12 / 7"), ("sort in C++?", "sort in C#?"), ("sort in C", "sort in C#")],
)
def test_operators_count(one: str, other: str) -> None:
    assert words(one).tolist() != words(other).tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [("12+7", "12 + 7"), ("# Head\n- **one**\n* two", "head one two"), ("so - it is", "so, it is"), ("+", "")],
)
def test_marks_of_the_layout_do_not_count(one: str, other: str) -> None:
    assert words(one).tolist() == words(other).tolist()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("the cat sat", 3),
        ("x" * 3000, 1),
        ("今日は良い天気", 7),
        ("สวัสดี", 6),
        ("नमस्ते दुनिया", 2),  # marks belong to their words
        ("안녕 세계", 2),
        ("GPU を2枚", 4),
        ("👍 ... !?", 0),
        ("", 0),
    ],
)
def test_words_of_languages_with_and_without_spaces(text: str, count: int) -> None:
    assert len(words(text)) == count


def test_words_differ_as_their_texts_do() -> None:
    texts = [f"{a}{b}" for a in ("", *"abcdefghij") for b in range(2000)] + [
        "ab",
        "ba",
        "aab",
        "aba",
        "a" * 70,
        "a" * 69,
    ]
    hashes = np.concatenate([words(text) for text in texts])
    assert len(np.unique(hashes)) == len(hashes) == len(texts)


def test_a_chinese_row_is_near_its_copy_and_not_another_one() -> None:
    text = "请用简单的语言解释光合作用的过程。植物利用阳光、水和二氧化碳制造糖和氧气,这发生在叶绿体中。"
    copy, other = (
        text.replace("简单", "浅显"),
        "请写一首关于秋天的短诗。落叶在风中飞舞,天空高远而清澈,人们在田野里收获粮食。",
    )
    assert near_twins(text_signatures([text, other, copy], Near(0.7, 3)), Near(0.7, 3)).tolist() == [-1, -1, 0]


def test_a_text_shorter_than_a_shingle_is_one_shingle_and_no_text_is_near_nothing() -> None:
    assert len(shingle_hashes(words("two words"), 3)) == len(shingle_hashes(words("now three words"), 3)) == 1
    found = text_signatures(["two words", "Two words!", "", "...", "", "words two"], NEAR)
    assert np.all(found[2:5] == EMPTY)
    assert near_twins(found, NEAR).tolist() == [-1, 0, -1, -1, -1, -1]
    assert near_of(found, found, NEAR).tolist() == [0, 0, -1, -1, -1, 5]


def test_the_system_prompt_is_not_counted_but_tool_calls_and_reasoning_are() -> None:
    system = " ".join(prose(0, 120))
    one = chat(("system", system), ("user", "Name a river in France."), ("assistant", "The Loire."))
    two = chat(("system", system), ("user", "What is seven times eight?"), ("assistant", "Fifty-six."))
    assert near_twins(signatures([one, two], NEAR)[:, 0], NEAR).tolist() == [-1, -1]
    counted = text_signatures([f"{c.messages[0].content}\n{whole_text(c)}" for c in (one, two)], NEAR)
    assert near_twins(counted, NEAR).tolist() == [-1, 0]  # the wrong variant finds them alike

    def call(city: str) -> Conversation:
        calls = ({"type": "function", "function": {"name": "weather", "arguments": {"city": city}}},)
        return Conversation("x", (Message("user", "Weather?"), Message("assistant", "", tool_calls=calls)))

    assert "Oslo" in whole_text(call("Oslo"))
    assert signatures([call("Oslo")], NEAR)[0, 0].tolist() != signatures([call("Rome")], NEAR)[0, 0].tolist()
    assert prompt_text(chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))) == "a"


# --- the estimate ---------------------------------------------------------------------------------------


def test_a_signature_is_that_of_datasketch_in_its_low_bits() -> None:
    hashes = shingle_hashes(words(" ".join(prose(0, 5000))), 3)
    other = MinHash(PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int)
    other.update_batch(hashes.tolist())
    ours = text_signatures([" ".join(prose(0, 5000))], NEAR)[0]
    assert ours.tolist() == (np.asarray(other.hashvalues) & 0xFFFF).tolist()


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("size", [20, 400, 20_000])
def test_the_estimate_has_no_bias(size: int, overlap: float) -> None:
    """Over 40 pairs the error of the mean is far below 0.02; the high 16 bits would see likeness in long texts that
    have none, for the least of many values begins with zeros."""
    random = np.random.default_rng(size)
    low, high, true = [], [], []
    for _ in range(40 if size < 1000 else 8):
        shared, apart = round(size * overlap), size - round(size * overlap)
        a, b, c = np.split(_distinct(random, shared + 2 * apart), [shared, shared + apart])
        one, other = (near_module._minima(np.concatenate([a, own]).astype(np.uint32)) for own in (b, c))
        low.append(np.mean((one & 0xFFFF) == (other & 0xFFFF)))
        high.append(np.mean(one >> 16 == other >> 16))
        true.append(shared / (shared + 2 * apart))
    assert abs(np.mean(low) - np.mean(true)) < 0.03
    if size == 20_000 and overlap == 0.0:
        assert np.mean(high) > 0.1


def _distinct(random: np.random.Generator, count: int) -> NDArray[np.int64]:
    found = np.unique(random.integers(2**32, size=2 * count))
    return random.permutation(found)[:count]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.75, 0.8, 0.9, 1.0])
def test_as_many_values_are_equal_as_the_threshold_says(threshold: float) -> None:
    near = Near(threshold, 3)
    base = alike(1, 0)[0]
    for unequal in (PERMUTATIONS - near.least_equal, PERMUTATIONS - near.least_equal + 1):
        other = base.copy()
        other[:unequal] ^= 1
        estimate = 1 - unequal / PERMUTATIONS
        assert (near_twins(np.stack([base, other]), near)[1] == 0) == (estimate >= threshold)


# --- no pair is missed --------------------------------------------------------------------------------


class FewBands(Near):
    """The wrong variant: wide bands, of which a pair at the threshold seldom has an equal one."""

    def bands(self) -> list[slice]:
        return [slice(start, start + 16) for start in range(0, PERMUTATIONS, 16)]


class AllBands(Near):
    """One band more than a near pair has unequal values: none is missed."""

    def bands(self) -> list[slice]:
        number = PERMUTATIONS - self.least_equal + 1
        return [slice(PERMUTATIONS * i // number, PERMUTATIONS * (i + 1) // number) for i in range(number)]


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_bands_cover_all_columns_and_miss_no_pair_at_the_threshold(threshold: float) -> None:
    near = Near(threshold, 3)
    edges = near.bands()
    assert edges[0].start == 0
    assert edges[-1].stop == PERMUTATIONS
    assert all(a.stop == b.start < b.stop for a, b in pairwise(edges))
    missed = share_missed([band.stop - band.start for band in edges], PERMUTATIONS - near.least_equal)
    assert missed <= near_module.MISSED
    assert share_missed([1, 1, 2], 2) == 0.0
    assert share_missed([1, 1], 2) == 1.0
    assert share_missed([2, 2], 2) == pytest.approx(4 / 6)
    found = _pairs_at_threshold(near)
    assert np.mean(near_twins(found, near)[1::2] == np.arange(0, len(found), 2)) > 0.99
    assert np.mean(near_of(found[1::2], found[::2], near) == np.arange(len(found) // 2)) > 0.99
    if threshold == 0.8:
        assert np.mean(near_twins(found, FewBands(threshold, 3))[1::2] >= 0) < 0.7


def _pairs_at_threshold(near: Near, pairs: int = 300) -> Array:
    """Rows 2 i and 2 i + 1 differ in as many values as near ones may."""
    random = np.random.default_rng(1)
    found = np.repeat(random.integers(2**16, size=(pairs, PERMUTATIONS), dtype=np.uint16), 2, axis=0)
    for row in range(1, 2 * pairs, 2):
        found[row, random.choice(PERMUTATIONS, PERMUTATIONS - near.least_equal, replace=False)] += 1
    return found


texts = st.lists(st.lists(st.sampled_from([f"w{i}" for i in range(12)]), max_size=12).map(" ".join), max_size=25)


@settings(max_examples=60, deadline=None)
@given(texts, st.sampled_from([0.5, 0.8, 1.0]), st.integers(1, 4), st.randoms(use_true_random=False))
def test_twins_are_those_of_all_pairs_in_any_order(
    rows: list[str], threshold: float, shingle: int, random: Random
) -> None:
    """Not the same groups, though: of three in a line the one in the middle may come first, or last."""
    near = AllBands(threshold, shingle)
    for _ in range(2):
        found = text_signatures(rows, near)
        twin = near_twins(found, near)
        equal = [[int(np.count_nonzero(a == b)) for b in found] for a in found]
        for late in range(len(rows)):
            nears = [e for e in range(late) if equal[late][e] >= near.least_equal and words(rows[late]).size]
            assert (twin[late] >= 0) == bool(nears)
            assert twin[late] < late
            assert not nears or twin[late] in nears
        assert np.array_equal(near_of(found, found, near) >= 0, [words(text).size > 0 for text in rows])
        random.shuffle(rows)


def test_only_the_rows_asked_for_are_compared() -> None:
    found = np.tile(alike(1, 0), (6, 1))
    assert near_twins(found, NEAR, np.array([1, 3, 4])).tolist() == [-1, -1, -1, 1, 1, -1]
    assert near_twins(found[:0], NEAR).tolist() == []
    assert near_of(found, found[:0], NEAR).tolist() == [-1] * 6
    assert near_of(found[:0], found, NEAR).tolist() == []


# --- templates ------------------------------------------------------------------------------------------

TEMPLATE = " ".join(f"rule{i} of the game is" for i in range(40))


def test_rows_that_share_a_template_alone_are_not_near() -> None:
    """1,000 questions below the same instructions: only the ten that are asked twice, with one word added, are near."""
    asked = [f"{TEMPLATE} {' '.join(prose(i, 20))}" for i in range(990)]
    copies = [f"{text} please" for text in asked[:10]]
    found = text_signatures(asked + copies, NEAR)
    twin = near_twins(found, NEAR)
    assert twin[990:].tolist() == list(range(10))
    assert np.all(twin[:990] == -1)
    assert np.array_equal(near_of(found[990:], found[:990], NEAR), np.arange(10))
    plain = near_module._alike(found[:500], found[400:900], Near(0.5, 3), np.zeros(2**16, dtype=bool))
    assert plain.mean() > 0.5  # the wrong variant counts the template


def test_common_shingles_are_found_by_their_rows_and_few_rows_have_none() -> None:
    found = text_signatures([f"{TEMPLATE} {' '.join(prose(i, 12))}" for i in range(400)], NEAR)
    ids = near_module._shingle_ids(found)
    template = np.unique(near_module._murmur(shingle_hashes(words(TEMPLATE), 3)) & 0xFFFF)
    assert set(template.tolist()) >= set(np.flatnonzero(common_shingles(found, np.arange(400))).tolist())
    assert common_shingles(found, np.arange(400)).sum() > 0.5 * len(template)  # those that are the least of some column
    assert np.isin(ids, template).mean() > 0.5
    assert not common_shingles(found, np.arange(40)).any()


# --- crowds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unequal", [0, 3, 12, 30])
def test_a_crowd_of_rows_alike_takes_no_longer_than_so_many_others(unequal: int) -> None:
    """All pairs of 20,000 would take minutes. Near ones (up to 12 values apart from the middle) leave one behind."""
    crowd = alike(20_000, unequal) if unequal else np.tile(alike(1, 0), (200_000, 1))
    began = time.process_time()
    twin = near_twins(crowd, NEAR)
    assert time.process_time() - began < 20
    kept = int(np.sum(twin < 0))
    assert kept == 1 if unequal == 0 else kept >= 1


def test_twice_the_rows_are_twice_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_module, "COMMON_ROWS", 10**9)  # so that the crowd is one
    assert _pairs(1600, monkeypatch) / _pairs(800, monkeypatch) < 2.3
    monkeypatch.setattr(near_module, "REACH", 10**6)  # the wrong variant: all pairs of a crowd
    assert _pairs(1600, monkeypatch) / _pairs(800, monkeypatch) > 3.5


def _pairs(rows: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pairs are looked at among rows that agree in 66 %: many in each band, hardly one of them near."""
    compared = 0
    compare = near_module._are_near

    def counting(a: Array, one: Rows, *rest: Any) -> NDArray[np.bool_]:
        nonlocal compared
        compared += len(one)
        return compare(a, one, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(near_module, "_are_near", counting)
        near_twins(alike(rows, 24), NEAR)
    return compared
