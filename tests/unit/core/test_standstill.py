from __future__ import annotations

import pytest
import torch

from sftdist.core.collectives import from_collective
from sftdist.core.standstill import Standstill, culprit
from sftdist.core.vitals import Vitals


def rank(number: int, step: int | None, waits: bool, count: int = 5, place: str = "collective.py:1") -> Standstill:
    return Standstill(Vitals(number, "host", 10 + number, step, "at work", count, 1), "stack", place, waits)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([rank(0, 7, True), rank(1, 7, False), rank(2, 7, True)], 1),
        ([rank(0, 7, True), rank(1, 7, True), rank(2, 6, True)], 2),
        # Rank 0 alone notes what it does, so its count runs ahead: not waiting says more.
        ([rank(0, 7, False, count=9), rank(1, 7, True), rank(2, 7, True)], 0),
        # All wait: the one in the earlier collective has not come to where the others are.
        ([rank(0, 7, True, count=6), rank(1, 7, True, count=5), rank(2, 7, True, count=6)], 1),
        # Nobody is seen to wait (a fused kernel): the odd one out.
        ([rank(0, 7, False), rank(1, 7, False), rank(2, 7, False, place="loader.py:3")], 2),
        # Not yet in its first step.
        ([rank(0, 1, True), rank(1, None, False)], 1),
    ],
)
def test_who_holds_up_the_rest(ranks: list[Standstill], named: int) -> None:
    assert culprit(ranks).vitals.rank == named
    assert culprit(ranks[::-1]).vitals.rank == named


def test_packed_and_unpacked() -> None:
    one = rank(1, None, True)
    assert Standstill.unpacked(one.packed()) == one
    assert Vitals.unpacked(one.vitals.packed().encode()) == one.vitals


def wrap() -> None:
    try:
        torch.distributed.all_reduce("not a tensor")
    except TypeError as error:
        raise RuntimeError("the engine says so") from error


def test_where_an_error_comes_from() -> None:
    with pytest.raises(TypeError) as raised:
        torch.distributed.all_reduce("not a tensor")
    assert from_collective(raised.value)
    with pytest.raises(RuntimeError) as wrapped:
        wrap()
    assert from_collective(wrapped.value)
    with pytest.raises(ZeroDivisionError) as own:
        _ = 1 / 0
    assert not from_collective(own.value)
