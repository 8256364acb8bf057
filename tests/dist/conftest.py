"""What the fault tests share: a folder with a model and rows, and the run that nothing has cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.saving import Shape, Whole, new_home, whole_run


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def shape() -> Shape:
    return Shape(stage=2, steps=24)


@pytest.fixture(scope="session")
def whole(home: Path, shape: Shape) -> Whole:
    return whole_run(home, shape, "whole")
