"""Start-up check 10 on several ranks: a disk that rank 0 cannot write stops all of them, at once and with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.distributed import World
from sftdist.core.errors import StartupError
from sftdist.training.contract import trial_save
from tests.ranks import run_ranks
from tests.training_cases import Case, make_engine


def _reason(world: World, folder: Path, stage: int) -> str:
    engine = make_engine(Case(stage), world)
    try:
        return trial_save(engine, folder, world, grace_seconds=300.0)
    except StartupError as error:
        return str(error)
    finally:
        engine.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_disk_that_cannot_be_written_stops_every_rank(tmp_path: Path, stage: int) -> None:
    reasons = run_ranks(_reason, 2, tmp_path / "absent", stage, timeout=60)
    assert reasons[0] == reasons[1]
    assert "a trial save failed" in reasons[0]
    assert all("a save takes" in text for text in run_ranks(_reason, 2, tmp_path, stage, timeout=60))
