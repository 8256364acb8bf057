"""A small run that saves after every step: the whole of it, and what a run that was cut must be equal to."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from sftdist.training.checkpoint_files import checkpoints_in
from tests.e2e.workshop import SMALL, metrics, model_folder, write_rows
from tests.faults import Job, contents
from tests.held import Hold, Operation

RANKS = 2
EXACT = ("step", "loss", "grad_norm", "lr", "rows")


@dataclass(frozen=True)
class Shape:
    """A run of `steps` steps, and how it saves."""

    stage: int
    steps: int
    background: bool = False
    checks: bool = False  # those of the start
    more: tuple[str, ...] = ()
    exp: str = "full"

    def overrides(self, run_dir: Path) -> list[str]:
        """The command line, for ranks in the home folder."""
        return [
            *(f"+exp={self.exp}", "model.path=model", "data.train=my.jsonl", *SMALL, "precision=fp32"),
            *(f"zero.stage={self.stage}", f"train.max_steps={self.steps}"),
            *("checkpoint.every_steps=1", f"checkpoint.background={_yaml(self.background)}"),
            *(f"train.startup_checks={_yaml(self.checks)}", f"run.dir={run_dir}", *self.more),
        ]


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run up to its export, and what the save of its step 3 did on each rank."""

    run_dir: Path
    operations: tuple[list[Operation], ...]

    def numbers(self, rank: int, *patterns: str) -> list[int]:
        """The first operation of that rank that each pattern is found in."""
        names = [operation.name for operation in self.operations[rank]]
        return [next(at for at, name in enumerate(names) if re.search(pattern, name)) for pattern in patterns]


def new_home(folder: Path) -> Path:
    """A folder with a model and rows."""
    model_folder(folder / "model")
    write_rows(folder / "my.jsonl", 300)
    return folder


def whole_run(home: Path, shape: Shape, name: str) -> Whole:
    run_dir = home / name
    with Job(RANKS, shape.overrides(run_dir), home, Hold(run_dir, step=3)) as job:
        return Whole(run_dir, tuple(job.hear(rank, "trained") for rank in range(RANKS)))


def go_on_to_the_end(home: Path, shape: Shape, run_dir: Path, newest: int) -> str:
    """The same command again: it takes up the checkpoint of step `newest` and trains to the export; the screen."""
    with Job(RANKS, shape.overrides(run_dir), home, Hold(run_dir, step=-1)) as job:
        assert job.hear(0, "resumed") == newest
        for rank in range(RANKS):
            job.hear(rank, "trained")
        return job.screen()


def assert_equal_runs(run_dir: Path, expected: Path) -> None:
    """Bit-equal: every step once with its figures and rows, and value and moments of every parameter at the end."""
    assert metrics(run_dir, *EXACT) == metrics(expected, *EXACT)
    assert _rows(run_dir) == _rows(expected)
    last, same = checkpoints_in(run_dir / "checkpoints")[-1].path, checkpoints_in(expected / "checkpoints")[-1].path
    assert last.name == same.name
    ours, theirs = contents(last), contents(same)
    tensors = [name for name in theirs if name.endswith(".safetensors")]
    assert len(tensors) == RANKS + 1
    assert all(ours[name] == theirs[name] for name in tensors)


def assert_no_litter(run_dir: Path) -> None:
    """What a cut save has left must not stay for ever: it is as large as a checkpoint."""
    names = [path.name for path in (*run_dir.iterdir(), *(run_dir / "checkpoints").iterdir())]
    assert [name for name in names if name.startswith(".")] == [".lock"]


def _rows(run_dir: Path) -> list[object]:
    return [json.loads(line) for line in (run_dir / "log/rows.jsonl").read_text().splitlines()]


def _yaml(value: bool) -> str:
    return str(value).lower()
