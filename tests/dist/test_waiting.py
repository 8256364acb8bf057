"""Ranks wait for each other as little as the plan says, measured on real ranks."""

import pytest

from benchmarks.waiting import measure
from tests.ranks import run_ranks


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_wait_less_than_in_random_order_and_as_little_as_planned(ranks: int) -> None:
    found = run_ranks(measure, ranks, 4, 4, timeout=600)[0]
    plan, random = found["plan"], found["random order"]
    assert plan["planned"] > 0.99
    assert plan["measured"] > 0.93
    assert plan["waiting"] < 0.7 * random["waiting"]
