"""Proof 5 (A8): one of four ranks fails inside a save. Everybody is out soon, and the save is not a checkpoint."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from sftdist.core.failure import read_failure
from sftdist.training.checkpoint_files import steps_in
from tests.faults import Job, after_load, before_save
from tests.saving import Shape

FAILING, OUT_WITHIN = 2, 10.0
ERRORS = {
    "its disk": OSError(errno.EIO, os.strerror(errno.EIO)),
    "a fault of ours": RuntimeError("a tensor is not there"),
    "its memory": MemoryError("no memory for the copy"),
}


@dataclass(frozen=True)
class FailToWrite:
    """A fault: in rank 2 the writing of tensors raises `error` in the save of step `step`."""

    error: Exception
    step: int

    def __call__(self, rank: int, pipe: Connection) -> None:
        after_load(lambda step: pipe.send(("resumed", step)))
        if rank == FAILING:
            before_save(lambda step: self._break(pipe) if step == self.step else None)

    def _break(self, pipe: Connection) -> None:
        def serialize_file(tensors: Any, path: Any, metadata: Any = None) -> None:
            pipe.send(("raised", time.monotonic()))
            raise self.error

        safetensors.torch.serialize_file = serialize_file  # type: ignore[assignment]


def test_everybody_is_out_within_seconds(home: Path) -> None:
    fail_in_turn(home, "four", [(0, "its disk"), (1, "a fault of ours")], Shape(2, steps=8))
    fail_in_turn(home, "four", [(2, "its memory")], Shape(2, steps=8, background=True))


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("background", [False, True])
def test_at_every_stage(home: Path, background: bool, stage: int) -> None:
    shape = Shape(stage, steps=8, background=background)
    fail_in_turn(home, f"four-{stage}-{background}", list(enumerate(ERRORS)), shape)


def fail_in_turn(home: Path, folder: str, errors: list[tuple[int, str]], shape: Shape) -> None:
    """Starts in one directory, each of which fails in its second save: so each takes up what the one before left.
    `errors`: the step that a start takes up, and what then happens."""
    run_dir = home / folder
    for newest, name in errors:
        error, step = ERRORS[name], newest + 2
        with Job(4, shape.overrides(run_dir), home, FailToWrite(error, step)) as job:
            assert job.hear(0, "resumed") == newest
            raised = job.hear(FAILING, "raised")
            codes = job.codes(timeout=60)
            seconds = time.monotonic() - raised
            screen = job.screen()
        assert seconds < OUT_WITHIN, screen
        assert all(codes), codes
        assert max(steps_in(run_dir / "checkpoints")) == step - 1
        assert f"rank {FAILING}" in screen
        assert str(error) in screen
        failure = read_failure(run_dir)
        assert failure is not None
        assert str(error) in failure.message
        assert failure.rank == FAILING or f"rank {FAILING}" in failure.message
        assert failure.step == step or shape.background  # training goes on while a thread writes
