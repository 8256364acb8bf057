"""The whole of an evaluation is the same for any number of ranks and, in float32, for any size of a batch."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sftdist import publish
from sftdist.core.distributed import World
from sftdist.core.errors import GateError
from sftdist.evals.looks import looks
from sftdist.evals.waiting import Beat, on_main, unbroken_on_main
from tests.ranks import RankError, run_ranks
from tests.suites import alone, found, home, judge, row, write_rows

Case = tuple[str, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home(tmp_path_factory.mktemp("judged"))


def case(folder: Path, name: str, batch: int) -> Case:
    """Words with a cache and an output of their own."""
    return (f"evals.batch_size={batch}", f"evals.cache={folder / name / 'answers'}", f"run.dir={folder / name}")


def same(one: tuple[dict[str, Any], list[str]], other: tuple[dict[str, Any], list[str]]) -> None:
    """But for the size of the batch, which the report says."""
    (report, rows), (its, its_rows) = one, other
    assert rows == its_rows
    assert report["metrics"] == its["metrics"]
    plain = {"batch_size": None}
    assert {**report, "decoding": {**report["decoding"], **plain}} == {**its, "decoding": {**its["decoding"], **plain}}


@pytest.fixture(scope="module")
def truth(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """By one process, a prompt at a time."""
    judge(alone(), folder, *case(folder, "alone-1", 1))
    return found(folder / "alone-1")


def judged(world: World, folder: Path, cases: list[Case]) -> list[str]:
    return [judge(world, folder, *words) for words in cases]


def test_what_is_compared_holds_something(truth: tuple[dict[str, Any], list[str]]) -> None:
    report, rows = truth
    names = set(report["metrics"])
    expected = {"validation.token_f1", "validation.instructions_strict", "validation.loss", "all.loss"}
    assert expected | {"robustness.typos", "robustness.no_system"} <= names
    assert len(rows) > 30
    said = [(row["tuned"], row["base"]) for row in map(json.loads, rows)]
    assert len({answer for pair in said for answer in pair}) > 20, "answers that differ"


def test_a_batch_of_seven_gives_the_same_report(folder: Path, truth: tuple[dict[str, Any], list[str]]) -> None:
    judge(alone(), folder, *case(folder, "alone-7", 7))
    same(found(folder / "alone-7"), truth)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 3])
def test_any_number_of_ranks_gives_the_same_report(
    folder: Path, truth: tuple[dict[str, Any], list[str]], ranks: int
) -> None:
    sizes = (1, 7)
    cases = [case(folder, f"ranks-{ranks}-{size}", size) for size in sizes]
    results = run_ranks(judged, ranks, folder, cases)
    assert all(hashes == results[0] for hashes in results), "every rank has the same report"
    for size in sizes:
        same(found(folder / f"ranks-{ranks}-{size}"), truth)


def test_a_look_at_the_holdout_is_one_look_on_any_number_of_ranks(folder: Path) -> None:
    words = (
        *("split=holdout", f"data.holdout={folder / 'hold.jsonl'}", "data.val=null"),
        *(f"data.store_dir={folder / 'held'}", f"run.dir={folder / 'held-out'}", "evals.probes=[task]"),
    )
    hashes = run_ranks(judged, 2, folder, [words, words])
    assert hashes[0] == hashes[1]
    assert len(looks(folder / "held")) == 2
    report, rows = found(folder / "held-out", "holdout")
    assert report["data"]["looks"] == 2
    assert len(rows) == 5


@pytest.mark.long
def test_a_fault_of_the_data_ends_every_rank_with_its_own_words(folder: Path) -> None:
    bad = write_rows(folder / "bad.jsonl", [row(1, checks={"shema": {}})])
    with pytest.raises(RankError, match=r"given checks\.shema, which no probe knows"):
        run_ranks(judged, 2, folder, [(f"data.val={bad}", f"run.dir={folder / 'bad'}")])


def waited(world: World, seconds: float) -> tuple[list[str] | None, list[int]]:
    """Rank 0 works, beat after beat; then all ranks say their numbers, which shows that none is a collective ahead."""

    def work(beat: Beat) -> list[str]:
        for _ in range(5):
            beat()
        return ["made"]

    return on_main(world, "working", work, seconds=seconds), world.gather_objects(world.rank)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_what_rank_0_does_by_itself_may_take_long(seconds: float) -> None:
    """However often it says that it gets on."""
    assert waited(alone(), seconds) == (["made"], [0])
    assert run_ranks(waited, 2, seconds) == [(["made"], [0, 1]), (None, [0, 1])]


def copied(world: World) -> tuple[str | None, int, list[int]]:
    """Rank 0 is busy with one long thing; how often each rank has seen that things get on."""
    before = world.progress.now.count

    def work() -> str:
        time.sleep(1.0)
        return "copied"

    made = unbroken_on_main(world, "copying", work, seconds=0.1)
    return made, world.progress.now.count - before, world.gather_objects(world.rank)


def test_what_rank_0_does_in_one_piece_may_take_long() -> None:
    """A copy of a large model, say: the ranks hear in the meantime that rank 0 lives."""
    assert copied(alone())[0] == "copied"
    (made, beats, ranks), (none, heard, same_ranks) = run_ranks(copied, 2)
    assert (made, none, ranks, same_ranks) == ("copied", None, [0, 1], [0, 1])
    assert beats == heard >= 3


def failed(world: World) -> None:
    def work() -> None:
        time.sleep(0.3)
        raise OSError("the disk is full")

    unbroken_on_main(world, "copying", work, seconds=0.1)


def test_what_rank_0_fails_at_is_its_own_error() -> None:
    with pytest.raises(OSError, match="the disk is full"):
        failed(alone())
    with pytest.raises(RankError, match=r"rank 0 of 2 failed:(.|\n)*the disk is full"):
        run_ranks(failed, 2)


def published(world: World, refused: bool) -> tuple[str, bool]:
    """What each rank hears, and whether it heard meanwhile that rank 0 lives."""

    def work() -> str:
        time.sleep(1.0)
        if refused:
            raise GateError("not good enough")
        return "v1"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "unbroken_on_main", partial(unbroken_on_main, seconds=0.1))
        before = world.progress.now.count
        try:
            said = publish.on_main(world, "releasing", work)
        except GateError as refusal:
            said = str(refusal)
    return said, world.progress.now.count - before >= 3


def test_every_rank_hears_what_came_of_a_release() -> None:
    assert run_ranks(published, 2, False) == [("v1", True)] * 2
    assert run_ranks(published, 2, True) == [("not good enough", True)] * 2
