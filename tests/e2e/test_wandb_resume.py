"""W&B behind the whole program: a server that never answers costs nothing; kill, preemption and end are one run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sftdist import train
from sftdist.training import wandb_process
from sftdist.training.tracking import Tracker
from sftdist.training.wandb_sink import STEP
from tests.e2e.workshop import SMALL, evaluations, metrics, status
from tests.faults import Job
from tests.wandb_runs import history, of_kind, read, runs_of, silent_server, within

EXACT = ("step", "loss", "grad_norm", "lr", "rows")
KEYS = [
    "+exp=full",
    "model.path=model",
    "data.train=my.jsonl",
    *(key for key in SMALL if not key.startswith(("tracking.wandb", "eval."))),
    "run.name=one-run",
    "zero.stage=0",
    "precision=fp32",
    "train.startup_checks=false",
    "train.max_steps=12",
    "checkpoint.every_steps=3",
    "eval.every_steps=4",
]


@dataclass(frozen=True)
class Loop:
    """How long the loop took, and the program after it."""

    seconds: float
    end: float
    screen: str


@pytest.fixture(scope="module")
def whole(home: Path) -> Loop:
    """The run that nothing has cut, without W&B."""
    return looped(home, "whole", "disabled", Watched({}))


def keys(run: str, wandb: str) -> list[str]:
    return [*KEYS, f"run.dir={run}", f"tracking.wandb={wandb}"]


@dataclass(frozen=True)
class Watched:
    """A fault: this environment, and a short wait at the end; tells how long the loop took and which process W&B is.
    Nothing is exported: W&B does not know of it, and it takes the longest."""

    environment: Mapping[str, str]
    close_seconds: float = 2.0

    def __call__(self, rank: int, pipe: Any) -> None:
        os.environ.update(self.environment)
        loop, opened = train.run_loop, partial(wandb_process.open_wandb, close_seconds=self.close_seconds)

        def run_loop(*given: Any) -> Any:
            began = time.monotonic()
            result = loop(*given)
            pipe.send(("looped", time.monotonic() - began))
            return result

        def open_wandb(*given: Any, **settings: Any) -> Any:
            sinks = opened(*given, **settings)
            pipe.send(("wandb", [sink._child.pid for sink in sinks]))
            return sinks

        train.run_loop = run_loop  # type: ignore[assignment]
        wandb_process.open_wandb = open_wandb
        train.export_model = lambda engine, template, folder, *more, **options: folder


@dataclass(frozen=True)
class SignalAfter(Watched):
    """A fault: also a signal to this process as soon as the figures of a step are written."""

    close_seconds: float = 30.0
    step: int = 0
    number: int = signal.SIGKILL

    def __call__(self, rank: int, pipe: Any) -> None:
        super().__call__(rank, pipe)
        report = Tracker.report

        def then_signal(tracker: Tracker, line: Mapping[str, Any]) -> None:
            report(tracker, line)
            if (line["kind"], line["step"]) == ("train", self.step):
                os.kill(os.getpid(), self.number)

        Tracker.report = then_signal  # type: ignore[method-assign,assignment]


def looped(home: Path, run: str, wandb: str, fault: Watched) -> Loop:
    with Job(1, keys(run, wandb), home, fault) as job:
        seconds = job.hear(0, "looped", 120)
        ended = time.monotonic()
        assert job.codes() == [0], job.screen()
        return Loop(seconds, time.monotonic() - ended, job.screen())


def unaffected(home: Path, whole: Loop, run: str, environment: Mapping[str, str], wandb: str = "online") -> str:
    """Train with this W&B: the figures and the time of a run without, a bounded end; what was printed about W&B."""
    loop = looped(home, run, wandb, Watched(environment))
    assert loop.seconds < 3 * whole.seconds + 5, "the loop waited for W&B"
    assert loop.end < 3 * whole.end + 5, "the end waited for W&B"
    assert metrics(home / run, *EXACT) == metrics(home / "whole", *EXACT)
    assert [step for (step,) in metrics(home / run, "step")] == list(range(1, 13))
    assert status(home / run)["state"] == "done"
    (said,) = [line for line in loop.screen.splitlines() if "W&B" in line]
    return said


def test_a_server_that_never_answers_costs_one_line(home: Path, whole: Loop) -> None:
    with silent_server() as (url, connections):
        said = unaffected(home, whole, "silent", {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40})
        assert connections, "W&B did try"
    assert "did not finish in 2 s and was stopped; metrics.jsonl has every figure" in said


@pytest.mark.long
def test_a_wandb_that_raises_or_cannot_connect_costs_one_line(home: Path, whole: Loop, tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise ImportError('protobuf is too old')\n")
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    assert "protobuf is too old" in unaffected(home, whole, "broken", {"PYTHONPATH": path}, "offline")
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    assert "did not finish in 2 s" in unaffected(home, whole, "refused", nobody)


def test_killed_preempted_and_finished_are_one_run_with_one_curve(home: Path, whole: Loop) -> None:
    """SIGKILL after step 5 (saved: 3), so that steps 4 and 5 are made again; SIGTERM before step 7; then to the end."""
    faults: list[tuple[SignalAfter, int]] = [
        (SignalAfter({}, step=5), -signal.SIGKILL),
        (SignalAfter({}, step=6, number=signal.SIGTERM), 0),
        (SignalAfter({}), 0),
    ]
    states, followers = [], []
    for fault, code in faults:
        with Job(1, keys("cut", "offline"), home, fault) as job:
            followers += job.hear(0, "wandb", 60)
            assert job.codes() == [code], job.screen()
        states.append(status(home / "cut")["state"])
    assert states == ["running", "preempted", "done"]
    assert metrics(home / "cut", *EXACT) == metrics(home / "whole", *EXACT)
    assert [step for (step,) in metrics(home / "cut", "step")] == list(range(1, 13))
    assert evaluations(home / "cut") == evaluations(home / "whole") != []
    assert within(60, lambda: not any(Path(f"/proc/{pid}").exists() for pid in followers))
    check_wandb(home / "cut")


def check_wandb(run_dir: Path) -> None:
    """What W&B would upload: three parts of one run, whose last value at each step is that of `metrics.jsonl`."""
    starts = [read(folder) for folder in runs_of(run_dir)]
    runs = [of_kind(records, "run")[0] for records in starts]
    assert [run["run_id"] for run in runs] == ["one-run"] * 3
    assert [run["display_name"] for run in runs] == ["one-run"] * 3
    assert len({run["project"] for run in runs}) == 1
    assert [len(of_kind(records, "preempting")) for records in starts] == [0, 1, 0]
    assert [of_kind(records, "exit")[0].get("exit_code", 0) for records in starts] == [1, 1, 0]
    figures = [history(records) for records in starts]
    trained = [[item[STEP] for item in items if "loss" in item] for items in figures]
    assert trained == [[1, 2, 3, 4, 5], [4, 5, 6, 7], [8, 9, 10, 11, 12]]
    last: dict[int, dict[str, Any]] = {}
    for item in (item for items in figures for item in items):
        last.setdefault(item[STEP], {}).update(item)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert Counter((line["kind"], line["step"]) for line in lines).most_common(1)[0][1] == 1
    assert sorted(last) == sorted({line["step"] for line in lines}) == list(range(1, 13))
    for line in lines:
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        assert {key: last[line["step"]][key] for key in numbers} == numbers
    again = {item[STEP]: item["loss"] for item in figures[1] if "loss" in item}
    assert {item[STEP]: item["loss"] for item in figures[0] if item[STEP] in (4, 5) and "loss" in item} == {
        step: again[step] for step in (4, 5)
    }, "the curve has no jump where steps were made again"
