"""The start-up contract: every check fires on what it is there for, with figures and what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError, DataError, StartupError
from sftdist.training.contract import save_and_compare
from sftdist.training.startup import (
    Check,
    Supervision,
    check_bos,
    check_disk,
    check_grace,
    check_rows,
    check_supervision,
    compare_memory,
    run_checks,
    same_on_every_rank,
)
from tests.ranks import RankError, run_ranks

ALONE = World(0, 1, 0, torch.device("cpu"))
SOUND = Supervision(tokens=100, supervised=40.0, stopped=1.0, doubled_bos=0)


def test_every_check_is_printed_with_its_figures() -> None:
    said: list[str] = []
    run_checks(ALONE, [Check("first", lambda: "1 of 1"), Check("second", lambda: "2 of 2")], said.append)
    assert [line.split(" (")[0] for line in said] == ["check  1/2 first: 1 of 1", "check  2/2 second: 2 of 2"]


def _refused_by_rank_1(world: World) -> str:
    def figures() -> str:
        if world.rank == 1:
            raise DataError("only this rank sees it")
        return "fine"

    try:
        run_checks(world, [Check("one", figures)], lambda line: None)
    except DataError as error:
        return str(error)
    return "went on"


def test_one_rank_that_refuses_stops_all() -> None:
    texts = run_ranks(_refused_by_rank_1, 2)
    assert texts == ["only this rank sees it (found by rank 1)", "only this rank sees it"]


def _compare(world: World) -> str:
    return same_on_every_rank(world, "the plan", f"hash-of-{'a' if world.rank else 'b'}")


def test_different_plans_are_refused_on_every_rank() -> None:
    with pytest.raises(RankError, match="the plan differs between ranks"):
        run_ranks(_compare, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"supervised": 0.0}, "no supervised token in 100 tokens"),
        ({"stopped": 0.99}, r"only 99\.00% of the conversations end"),
    ],
)
def test_supervision_that_cannot_teach_is_refused(changes: dict[str, Any], message: str) -> None:
    broken = replace(SOUND, **changes)
    with pytest.raises(DataError, match=message):
        check_supervision({"good": SOUND, "mine": broken}, [], trained=False)


def test_an_untrained_template_token_must_be_trained() -> None:
    with pytest.raises(ConfigError, match=r"tokens \[7, 8\] whose embedding rows were never trained"):
        check_supervision({"mine": SOUND}, [7, 8], trained=False)
    assert "2 untrained template rows are trained too" in check_supervision({"mine": SOUND}, [7, 8], trained=True)


def test_a_second_bos_is_refused() -> None:
    with pytest.raises(DataError, match="source mine: 3 conversations begin with two BOS"):
        check_bos({"mine": Supervision(100, 40.0, 1.0, doubled_bos=3)})


def test_an_id_without_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="token id 100 is in the data, but the embedding has 100 rows"):
        check_rows(100, 100)
    check_rows(101, 100)


def test_a_disk_without_room_for_two_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="two checkpoints need"):
        check_disk(tmp_path, 2**60)


def test_a_save_longer_than_the_grace_is_refused() -> None:
    with pytest.raises(StartupError, match=r"Set checkpoint\.grace_seconds=151"):
        check_grace(100.0, 30.0)


def test_a_pack_that_does_not_fit_names_the_overrides() -> None:
    with pytest.raises(StartupError, match=r"would fit: zero\.stage=3"):
        compare_memory(90 * 2.0**30, 95 * 2.0**30, 80 * 2.0**30, ["zero.stage=3"])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="a trial save failed"):
        save_and_compare(tmp_path / "absent" / "trial.safetensors", {"weight": torch.ones(4)})
    save_and_compare(tmp_path / "trial.safetensors", {"weight": torch.ones(4)})
    assert not list(tmp_path.iterdir()), "the trial leaves nothing behind"
