"""A job that is told to stop: by any signal, to any process, once or often, during a save that takes long."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sftdist.training.checkpoint import verify
from tests.e2e.jobs import KEYS, TRAIN, Running, finish, same, torchrun
from tests.e2e.workshop import metrics, status, write_rows
from tests.faults import before_export, train_to_the_end

pytestmark = pytest.mark.timeout(900)  # several starts of torchrun each, on a machine that may be busy
TERM, USR1, USR2, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT


def stopped_where_it_says(run_dir: Path) -> int:
    """The step of a preempted run: in the status, in the figures and in the newest checkpoint the same."""
    found = status(run_dir)
    assert (found["state"], found["code"]) == ("preempted", 75)
    step = int(found["step"])
    assert metrics(run_dir, "step")[-1] == (step,)
    newest = run_dir / f"checkpoints/step-{step:08d}"
    assert (run_dir / "LATEST").read_text().strip() == f"checkpoints/{newest.name}"
    assert verify(newest) == []
    return step


def test_a_bare_torchrun_stops_when_one_rank_is_told_to(place: Path) -> None:
    """Default flags: no failure, no restart; the same line goes on, bit-equal."""
    command = [*torchrun("--max-restarts", "1"), *KEYS, "run.dir=runs/bare"]
    with Running(command, place) as job:
        job.until_step(place / "runs/bare", 3)
        job.tell(USR2, job.ranks()[1])
        assert job.end() == 0, job.screen
        assert job.screen.count("plan:") == 1, "not started again"
    step = stopped_where_it_says(place / "runs/bare")
    assert 3 <= step < metrics(place / "runs/whole", "step")[-1][0]
    finish(place, "run.dir=runs/bare")
    assert same(place, "runs/bare", "runs/whole")


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "target"),
    [
        *((number, "command") for number in (TERM, USR1, USR2, INT)),
        *((number, "agent") for number in (TERM, USR1)),
        *((TERM, "rank 0"), (INT, "rank 1"), (TERM, "everybody"), (USR1, "everybody")),
    ],
)
def test_any_signal_to_any_process(place: Path, number: signal.Signals, target: str) -> None:
    run_dir = place / f"runs/{number.name}-{target.replace(' ', '')}"
    with Running([*TRAIN, *KEYS, f"run.dir={run_dir}"], place) as job:
        job.until_step(run_dir, 3)
        ranks, agent = job.ranks(), job.agent()
        everybody = (job.process.pid, agent, *ranks.values())
        pids = {"command": everybody[:1], "agent": (agent,), "rank 0": (ranks[0],), "rank 1": (ranks[1],)}
        job.tell(number, *pids.get(target, everybody))
        assert job.end() == 75, job.screen
    stopped_where_it_says(run_dir)
    finish(place, f"run.dir={run_dir}")
    assert same(place, run_dir.relative_to(place).as_posix(), "runs/whole")


@pytest.mark.long
def test_a_signal_before_the_first_step_loses_nothing(place: Path) -> None:
    for number, seconds in ((TERM, 0.5), (USR1, 3.0), (TERM, 6.0), (INT, 8.0)):  # imports of the command, of the ranks
        run_dir = place / f"runs/early-{seconds}"
        with Running([*TRAIN, *KEYS, f"run.dir={run_dir}", "launch.nproc=1"], place) as job:
            time.sleep(seconds)
            job.tell(number)
            code = job.end()
            assert code in (75, -number), job.screen  # killed while Python starts: it had not taken signals over
            assert "Traceback" not in job.screen or code == -number


def slow(run_dir: Path, grace: float) -> list[str]:
    """The trainer whose saves are slow, started as `sftdist train` starts the real one, without periodical saves."""
    keys = [*KEYS, f"run.dir={run_dir}", "checkpoint.every_steps=0"]
    return [sys.executable, "-m", "tests.children", "slow", str(run_dir), str(grace), *keys]


def in_its_save(job: Running, run_dir: Path) -> None:
    """Tell the command to stop, and wait until it is about to publish its checkpoint."""
    job.until_step(run_dir, 3)
    job.tell(TERM)
    job.until(lambda: "publishing step-" in job.screen)


@pytest.mark.long
def test_a_save_of_45_seconds_survives_and_further_signals_do_nothing(place: Path) -> None:
    """A TERM to every process, twice, is what a cluster does; with torchrun's defaults it would be cut."""
    run_dir = place / "runs/patient"
    with Running(slow(run_dir, 90), place, {"SLOW_SAVE": "45"}) as job:
        in_its_save(job, run_dir)
        began = time.monotonic()
        for number in (TERM, USR1, TERM, USR2):
            time.sleep(1)
            job.tell(number, job.process.pid, job.agent(), *job.ranks().values())
        assert job.end() == 75, job.screen
        assert time.monotonic() - began > 40
    stopped_where_it_says(run_dir)
    finish(place, f"run.dir={run_dir}")
    assert same(place, "runs/patient", "runs/whole")


@contextmanager
def second_start(place: Path, name: str, grace: float) -> Iterator[Running]:
    """A run with a checkpoint, in its second start, whose saves are slow and which fails. The checkpoint is untouched,
    and the run goes on from it, bit-equal."""
    run_dir = place / "runs" / name
    stop_early(place, run_dir)
    before = stopped_where_it_says(run_dir)
    with Running(slow(run_dir, grace), place, {"SLOW_SAVE": "45"}) as job:
        job.until_step(run_dir, before + 1)
        yield job
    assert status(run_dir)["state"] == "failed"
    assert untouched(run_dir, before)
    finish(place, f"run.dir={run_dir}")
    assert same(place, f"runs/{name}", "runs/whole")


@pytest.mark.long
def test_a_save_longer_than_the_grace_is_cut(place: Path) -> None:
    """What the test above would see with too little grace."""
    with second_start(place, "hasty", grace=5) as job:
        job.tell(TERM)
        assert job.end(40) == 1, job.screen


@pytest.mark.long
def test_a_second_ctrl_c_stops_at_once_even_in_a_save(place: Path) -> None:
    with second_start(place, "impatient", grace=90) as job:
        job.tell(INT)
        job.until(lambda: "publishing step-" in job.screen)
        began = time.monotonic()
        job.tell(INT)
        assert job.end(20) == 1, job.screen
        assert time.monotonic() - began < 10
        assert job.ranks() == {}


def test_a_signal_while_small_data_is_prepared_loses_nothing(place: Path) -> None:
    """`sftdist train` itself prepares it, before any rank exists: 75, no half store, and what was done is kept."""
    write_rows(place / "many.jsonl", 40_000)
    keys = ["data.train=many.jsonl", "run.dir=runs/many", "data.store_dir=stores-of-many"]
    with Running([*TRAIN, *KEYS, *keys], place) as job:
        job.until(lambda: any((place / "stores-of-many").glob(".train-*.work/*.npz")))
        job.tell(TERM)
        assert job.end() == 75, job.screen
    [left] = (place / "stores-of-many").iterdir()
    assert left.match(".train-*.work")
    assert any(left.glob("*.npz"))
    assert not (place / "runs/many").exists()


def stop_in_the_export(rank: int, pipe: Connection) -> None:
    if rank == 1:
        before_export(lambda: os.kill(os.getpid(), TERM))


def test_a_stop_in_the_export_leaves_it_for_the_next_start(place: Path) -> None:
    keys = [*KEYS, "train.max_steps=2", "run.dir=runs/exporting"]
    train_to_the_end(2, keys, place, stop_in_the_export)
    assert stopped_where_it_says(place / "runs/exporting") == 2
    assert not list((place / "runs/exporting").glob("*export*"))
    train_to_the_end(2, keys, place)
    assert status(place / "runs/exporting")["state"] == "done"
    assert (place / "runs/exporting/export/model.safetensors").is_file()


def stop_early(place: Path, run_dir: Path) -> None:
    """A run that has one checkpoint, and is stopped."""
    with Running([*TRAIN, *KEYS, f"run.dir={run_dir}"], place) as job:
        job.until_step(run_dir, 2)
        job.tell(TERM)
        assert job.end() == 75, job.screen


def untouched(run_dir: Path, step: int) -> bool:
    """Whether the checkpoint of `step` is whole and the newest one that counts."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step-*")]
    return max(names) == f"step-{step:08d}" and verify(run_dir / "checkpoints" / max(names)) == []
