"""The answers are the same for any number of ranks and, in float32, for any size of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.figures import watched
from sftdist.evals.decoding import Decoding
from sftdist.evals.prompts import Answer
from sftdist.evals.report import EvalReport, ModelFacts, Scores
from sftdist.evals.watch import WatchedRun, watch
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


def _watched(world: World, folder: Path) -> tuple[int, list[int]]:
    """Checkpoints 1 to 3 of a run that is over, the second of which cannot be exported."""
    seen: list[int] = []

    @contextmanager
    def exported(step: int) -> Iterator[Path]:
        assert world.is_main
        if step == 2:
            raise CheckpointError("it was pruned")
        yield folder / str(step)

    def score(exported: Path, step: int) -> EvalReport:
        assert exported.name == str(step)
        seen.append(step)
        world.barrier()
        facts = ModelFacts(str(exported), "0" * 64)
        return EvalReport("now", "validation", facts, None, {}, {}, {"m": Scores(["a"], [float(step)])})

    run = WatchedRun(folder, lambda: [3, 1, 2], lambda: True, exported)
    return watch(run, world, score, seconds=0.0, say=print), seen


def test_all_ranks_score_what_rank_0_exports(tmp_path: Path) -> None:
    assert run_ranks(_watched, 2, tmp_path) == [(2, [1, 3])] * 2
    assert [line["m"] for line in watched(tmp_path)] == [1.0, 3.0]
