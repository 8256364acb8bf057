"""Folders with a tiny model and tiny data, one with an uninterrupted run, for the tests that interrupt others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import finish
from tests.e2e.workshop import model_folder, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user brings: `model` and `my.jsonl`."""
    folder = tmp_path_factory.mktemp("home")
    model_folder(folder / "model")
    write_rows(folder / "my.jsonl")
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/whole` is what every interrupted run must end up equal to."""
    folder = tmp_path_factory.mktemp("place")
    model_folder(folder / "model")
    write_rows(folder / "my.jsonl")
    finish(folder, "run.dir=runs/whole")
    return folder
