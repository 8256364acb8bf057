"""X4 for a checkpoint with a vision tower, whose weights a checkpoint of the run does not hold: killed and resumed on
partitions, with and without adapters, it is the run that nobody has killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.interrupted import Case, almost_to_the_end, cut_at, lines_of, row_ids, workplace
from tests.multimodal import gemma3_folder

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workplace(tmp_path_factory.mktemp("home"))
    shutil.rmtree(folder / "model")
    gemma3_folder(folder / "model")
    return folder


@pytest.mark.parametrize("case", [Case(3, "full", "sampling"), Case(2, "lora", "loss")], ids=lambda case: case.name)
def test_killed_and_resumed_is_the_same_run(home: Path, case: Case) -> None:
    whole, cut = (f"runs/{case.name}-{kind}" for kind in ("whole", "cut"))
    almost_to_the_end(home, case, whole)
    cut_at(home, case, cut, "kill", 0.5)
    almost_to_the_end(home, case, cut)
    assert lines_of(home / cut) == lines_of(home / whole)
    assert row_ids(home / cut) == row_ids(home / whole)
