"""The answers are the same for any number of ranks and, in float32, for any size of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.distributed import World
from sftdist.evals.decoding import Decoding
from sftdist.evals.prompts import Answer
from tests.evaluated import Counting, ask_through, prompts
from tests.ranks import run_ranks

PROMPTS = prompts(14)


def _asked(world: World, cases: list[tuple[Decoding, Path | None]]) -> tuple[list[list[Answer]], list[int]]:
    """The answers of each case, and how many prompts this rank's engines had in each call."""
    calls: list[int] = []
    found = [ask_through(folder, PROMPTS, way, world, lambda engine: Counting(engine, calls)) for way, folder in cases]
    return found, calls


SIZES = [Decoding(max_new_tokens=10, batch_size=size) for size in (1, 3, 8)]
ROUNDED = Decoding(max_new_tokens=10, batch_size=3, dtype="bf16")


@pytest.fixture(scope="module")
def alone() -> list[list[Answer]]:
    """By one process: float32 in batches of 1, 3 and 8, then bf16 in batches of 3."""
    return [ask_through(None, PROMPTS, way) for way in (*SIZES, ROUNDED)]


def test_a_batch_of_any_size_gives_the_same_answers_in_float32(alone: list[list[Answer]]) -> None:
    assert alone[0] == alone[1] == alone[2]
    assert len({answer.text for answer in alone[0]}) > 5


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_answers(ranks: int, alone: list[list[Answer]], tmp_path: Path) -> None:
    """Also in bf16, where batches decide: they are formed before they are dealt. The second time the cache answers."""
    ways = [(way, tmp_path) for way in (*SIZES, ROUNDED)]
    results = run_ranks(_asked, ranks, [*ways, *ways])
    for found, calls in results:
        assert found == [*alone, *alone]
        assert calls, "a rank had nothing to do"
    # 13 different prompts, four ways, once each
    assert sum(sum(calls) for _, calls in results) == 13 * len(ways)


def test_more_ranks_than_batches(alone: list[list[Answer]]) -> None:
    way = Decoding(max_new_tokens=10, batch_size=64)
    results = run_ranks(_asked, 2, [(way, None)])
    assert [found for found, _ in results] == [[alone[0]]] * 2
    assert [calls for _, calls in results] == [[13], []]
