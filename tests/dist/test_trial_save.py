"""Start-up check 10 on several ranks: a disk that rank 0 cannot write stops all of them, at once and with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.distributed import World
from sftdist.core.errors import StartupError
from sftdist.core.settings import CheckpointSettings
from sftdist.training.trial import save_figures
from tests.ranks import run_ranks
from tests.training_cases import Case, make_engine


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
    assert "a trial save failed" in reasons[0]
    assert reasons[1] == f"{reasons[0]} (found by rank 0)"
    for text in run_ranks(_reason, 2, tmp_path, stage, background, timeout=60):
        assert "a save takes about" in text
        assert ("training waits about" in text) == background
    assert not list(tmp_path.iterdir())
