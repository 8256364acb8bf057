"""A run over two sources that a test ends where it likes and takes up again, through the whole program."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sftdist.core.storage import read_json, read_jsonl
from sftdist.data.loader import Loader, Step
from tests.e2e.workshop import model_folder, rows, status
from tests.faults import Fault, Job

EPOCHS = 3
SIZES = {"large": 60, "small": 12}  # conversations; with its lambda, `small` is seen seven times in three epochs
# What a clock or a memory gauge says; all other figures of a run are its own.
MEASURED = ("step_seconds", "tokens_per_second", "mfu", "data_wait_seconds", "memory_gib")


@dataclass(frozen=True)
class Case:
    """One run. `how`: the way it ends in each epoch, all ranks killed or one of them asked to stop; "": it does not."""

    stage: int
    method: str
    mode: str
    how: tuple[str, str, str] = ("kill", "kill", "kill")
    dropout: float = 0.1
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"zero{self.stage}-{self.method}-{self.mode}"

    def overrides(self, run_dir: str) -> list[str]:
        more = [f"tune.dropout={self.dropout}"] if self.method != "full" else []
        if self.stage == 3:  # else DeepSpeed keeps every parameter of a model this small whole
            more.append("+zero.deepspeed.zero_optimization.stage3_param_persistence_threshold=0")
        return [
            f"+exp={self.method}",
            "model.path=model",
            "+data.sources.large.path=large.jsonl",
            "+data.sources.large.lam=0.6",
            "+data.sources.small.path=small.jsonl",
            "+data.sources.small.lam=0.4",
            "data.val=val.jsonl",
            "data.max_len=256",
            "data.workers=1",
            f"data.mix_mode={self.mode}",
            "precision=fp32",
            f"zero.stage={self.stage}",
            f"train.epochs={EPOCHS}",
            "train.packs_per_step=4",
            "train.window=24",  # a window is two steps: a position is mostly inside of one
            "optimizer.lr=1e-3",
            "checkpoint.every_steps=3",
            "eval.every_steps=6",
            "tracking.wandb=disabled",
            f"run.dir={run_dir}",
            *more,
            *self.more,
        ]


def workplace(folder: Path) -> Path:
    """A model and the rows of both sources, and some for the evaluations."""
    model_folder(folder / "model")
    made = rows(sum(SIZES.values()) + 6)
    for name, count in (*SIZES.items(), ("val", 6)):
        mine, made = made[:count], made[count:]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    return folder


def end(how: str, when: float, run_dir: str, rank: int, pipe: Connection) -> None:
    """The fault: after this part of the run's steps every rank is killed, or the last one is asked to stop."""
    take = Loader.take

    def last_take(loader: Loader) -> Step:
        taken = take(loader)
        if taken.step == int(when * read_json(Path(run_dir) / "plan.json")["steps"]):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif rank == int(os.environ["WORLD_SIZE"]) - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return taken

    Loader.take = last_take  # type: ignore[method-assign,assignment]


def job(home: Path, case: Case, run_dir: str, fault: Fault, ranks: int = 2, killed: bool = False) -> None:
    """Run until it ends: well on every rank, or killed (a rank that was a step behind may die of the others' end)."""
    with Job(ranks, case.overrides(run_dir), home, fault) as started:
        codes = started.codes(timeout=240)
        as_meant = (-signal.SIGKILL in codes and 0 not in codes) if killed else codes == [0] * ranks
        assert as_meant, f"exit codes {codes}\n{started.screen()}"


def cut_at(home: Path, case: Case, run_dir: str, how: str, when: float, ranks: int = 2) -> None:
    """Run until it is ended after this part of its steps: "kill" or "term"."""
    job(home, case, run_dir, partial(end, how, when, run_dir), ranks, killed=how == "kill")


def almost_to_the_end(home: Path, case: Case, run_dir: str, ranks: int = 2) -> None:
    """Stopped in its last steps: a checkpoint holds what the export would, and the export would take longest."""
    cut_at(home, case, run_dir, "term", 0.9, ranks)
    assert status(home / run_dir)["state"] == "preempted"


def saved_step(run_dir: Path) -> int:
    return int((run_dir / "LATEST").read_text().strip().rpartition("-")[2])


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, evaluations too, without what a clock says."""
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in read_jsonl(run_dir / "metrics.jsonl")
    ]


def row_ids(run_dir: Path) -> list[list[str]]:
    return [line["rows"] for line in read_jsonl(run_dir / "log/rows.jsonl")]
