"""A rank that runs out of memory in the middle of training ends all, with what takes it and what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sftdist.training.engine import Engine
from tests.e2e.workshop import SMALL, model_folder, status, write_rows
from tests.faults import Job

KEYS = (
    *("+exp=full", "model.path=model", "data.train=my.jsonl", *SMALL, "precision=fp32", "zero.stage=1"),
    *("train.epochs=2", "train.startup_checks=false", "data.max_len=128", "train.pack_tokens=512"),
    *("checkpoint.every_steps=2", "run.dir=run"),
)


def short_of_memory(rank: int, pipe: Any) -> None:
    """A fault: in its third step rank 1 asks torch's allocator for more than any machine has."""
    original, taken = Engine.step, []

    def step(engine: Engine, lr: float) -> Any:
        taken.append(lr)
        if rank == 1 and len(taken) == 3:
            torch.empty(2**50, dtype=torch.uint8)
        return original(engine, lr)

    Engine.step = step  # type: ignore[assignment, method-assign]


def test_memory_by_part_and_overrides_that_would_fit(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "my.jsonl")
    with Job(2, KEYS, tmp_path, short_of_memory) as job:
        codes = job.codes()
        screen = job.screen()
    assert all(codes), screen
    first, *rest = screen[screen.index("sftdist: error: rank 1") :].splitlines()
    assert "in step 3, updating the weights: memory: rank 1 ran out of it (" in first
    assert "can't allocate memory: you tried to allocate 1125899906842624 bytes" in first
    assert rest[0].startswith("by part, as predicted for a full pack of 512 tokens, in GiB a rank: context 0.6, ")
    assert rest[1].startswith("at its peak this rank held 0.")
    assert rest[2] == "The cheapest overrides that would fit:" or rest[2].startswith("No override is known")
    assert "Traceback" not in "".join(rest), "it is no fault of the program"
    assert status(tmp_path / "run")["state"] == "failed"
