"""A decoder beside a frozen vision tower on CUDA: the checks of the start, a step, and the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sftdist.core.config import compose
from sftdist.train import run
from tests.e2e.test_multimodal import KEYS, require_whole
from tests.e2e.workshop import write_rows
from tests.multimodal import gemma3_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("method", "stage"), [("full", 1), ("full", 3), ("lora", 3)])
def test_the_tower_comes_out_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stage: int
) -> None:
    monkeypatch.chdir(tmp_path)
    gemma3_folder(tmp_path / "model")
    write_rows(tmp_path / "my.jsonl", 60)
    keys = ("optimizer.lr=0.02", f"zero.stage={stage}", "train.max_steps=2", "run.dir=runs/one")
    run(compose(method, [*KEYS, *keys]))
    require_whole(tmp_path / "model", tmp_path / "runs/one/export")
