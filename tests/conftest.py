"""Fixtures and skips that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Set before anything imports DeepSpeed, and inherited by every process that a test starts.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the three real sources: SFTDIST_DATA, else the checkout's neighbour ../shared/data."""
    folder = Path(os.environ.get("SFTDIST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "domain_gsm8k.messages.jsonl").is_file():
        pytest.skip(f"the real chat data is not at {folder}; set SFTDIST_DATA to its folder")
    return folder
