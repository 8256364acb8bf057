"""Start-up check 10 on several ranks: a disk that one of them cannot write stops all, at once and with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.distributed import World
from sftdist.core.errors import StartupError
from sftdist.core.settings import CheckpointSettings
from sftdist.training import trial
from sftdist.training.trial import save_figures, some_state
from tests.ranks import run_ranks
from tests.training_cases import Case, make_engine


def _pieces(world: World, room: int) -> tuple[int, int]:
    trial.TRIAL_BYTES = room  # smaller than the first parameter of a tiny model
    engine = make_engine(Case(3), world)
    piece, gathered = some_state(engine)
    engine.close()
    return sum(tensor.nbytes for tensor in piece.values()), gathered


def test_a_large_embedding_is_gathered_but_not_copied() -> None:
    """At 70B the first parameter and its moments are 12 GiB: no rank copies or writes them for a trial."""
    for copied, gathered in run_ranks(_pieces, 2, 1024):
        assert copied <= 1024 + 8  # at least one number of each
        assert gathered > 10 * 1024


def _one_cannot_write(world: World, folder: Path) -> str:
    return _reason(world, folder / "absent" if world.rank else folder, 2, False)


def test_one_disk_that_cannot_be_written_stops_every_rank(tmp_path: Path) -> None:
    reasons = run_ranks(_one_cannot_write, 2, tmp_path, timeout=60)
    assert "a trial save failed" in reasons[1]
    assert reasons[0] == f"{reasons[1]} (found by rank 1)"


def _reason(world: World, folder: Path, stage: int, background: bool) -> str:
    engine = make_engine(Case(stage), world)
    try:
        return save_figures(engine, folder, world, CheckpointSettings(background=background))
    except StartupError as error:
        return str(error)
    finally:
        engine.close()


@pytest.mark.parametrize(("stage", "background"), [(0, False), (3, True)])
def test_a_disk_that_cannot_be_written_stops_every_rank(tmp_path: Path, stage: int, background: bool) -> None:
    reasons = run_ranks(_reason, 2, tmp_path / "absent", stage, background, timeout=60)
    for rank, reason in enumerate(reasons):
        assert f".trial.{rank:05d}.tmp: a trial save failed" in reason
    for text in run_ranks(_reason, 2, tmp_path, stage, background, timeout=60):
        assert "a save takes about" in text
        assert ("training waits about" in text) == background
    assert not list(tmp_path.iterdir())
