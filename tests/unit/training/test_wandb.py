"""W&B against the real thing: its offline file read by its own reader, a silent server, a broken package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.figures import BETTER, WATCHED
from sftdist.core.storage import append_jsonl
from sftdist.training.tracking import METRICS, Tracker, open_tracker
from sftdist.training.wandb_process import SPEC, WandbProcess, has_unlogged, open_wandb, wandb_id
from sftdist.training.wandb_sink import STEP, has_key
from tests.wandb_runs import history, of_kind, read, runs_of, silent_server, within


def follow(run_dir: Path, *, resumed_step: int = 0, **options: Any) -> tuple[Tracker, list[str]]:
    """A tracker with files and a W&B process, and the list of what W&B said on the console."""
    said: list[str] = []
    tracker = open_tracker(run_dir, resumed_step=resumed_step)
    settings = {
        "mode": "offline",
        "project": "a-project",
        "entity": "a-team",
        "group": "a-group",
        "tags": ["one", "two"],
        "name": "a-run",
        "notes": "a note",
        "config": {"optimizer": {"lr": 0.1}},
        "close_seconds": 60.0,
    }
    return tracker.followed_by(*open_wandb(run_dir, say=said.append, **{**settings, **options})), said


@contextmanager
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A key, and a server that takes connections (the list of them) and never answers."""
    with silent_server() as (url, connections):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield connections


def train_line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 10 / 3 / step, "lr": 0.1 * step, "mfu": None, "loss/domain": 1 / step, "rows": "ab"}


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of the newest start."""
    return of_kind(read(runs_of(run_dir)[-1]), kind)


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The figures of the newest start."""
    return history(read(runs_of(run_dir)[-1]))


def test_offline_file_holds_the_figures_of_metrics_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with silence(monkeypatch) as connections:
        tracker, said = follow(tmp_path)
        for step in range(1, 8):
            tracker.step(train_line(step), ["row"])
        tracker.report({"kind": "eval", "step": 7, "eval/loss": 2 / 3, "eval/loss/domain": 1 / 7})
        tracker.close("done")
        assert connections == []
    assert said == []
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    items = logged(tmp_path)
    assert len(items) == len(lines) == 8
    for line, item in zip(lines, items, strict=True):
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
        assert {key: item[key] for key in numbers} == numbers
        assert item[STEP] == line["step"]
        assert set(item) - set(numbers) - {STEP} == {"_step", "_runtime", "_timestamp"}
    run = records(tmp_path, "run")[0]
    assert (run["run_id"], run["display_name"], run["project"]) == ("a-run", "a-run", "a-project")
    assert (run["entity"], run["run_group"], run["notes"]) == ("a-team", "a-group", "a note")
    assert run["tags"] == ["one", "two"]
    assert run["config"]["update"]["optimizer"] == {"lr": 0.1}
    axes = [record for record in records(tmp_path, "metric") if record.get("glob_name") == "*"]
    assert axes[0]["step_metric"] == STEP
    assert records(tmp_path, "preempting") == []
    assert not list((tmp_path / "wandb").glob("*run-*/files/*"))


def test_preempted_run_is_marked_and_resumes_under_the_same_id(tmp_path: Path) -> None:
    tracker, _ = follow(tmp_path)
    for step in range(1, 6):
        tracker.step(train_line(step), ["row"])
    tracker.close("preempted")
    assert len(records(tmp_path, "preempting")) == 1
    assert records(tmp_path, "exit")[0]["exit_code"] == 1
    first_id = records(tmp_path, "run")[0]["run_id"]
    time.sleep(1.1)  # wandb names its folders by the second
    tracker, _ = follow(tmp_path, resumed_step=3)
    for step in range(4, 7):
        tracker.step(train_line(step), ["row"])
    tracker.close("done")
    run = records(tmp_path, "run")[0]
    assert run["run_id"] == first_id
    assert run["resume"] is True
    assert [item[STEP] for item in logged(tmp_path)] == [4, 5, 6]


def test_killed_trainer_leaves_no_process_and_no_figure_behind(tmp_path: Path) -> None:
    script = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.unit.training.test_wandb import follow, train_line
tracker, _ = follow(Path(sys.argv[1]))
for step in range(1, 4):
    tracker.step(train_line(step), ["row"])
print(tracker.sinks[0]._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", script, tmp_path, root], capture_output=True, text=True, cwd=root)
    assert done.returncode == -9, done.stderr
    pid = int(done.stdout)
    assert within(60, lambda: not Path(f"/proc/{pid}").exists())
    assert [item[STEP] for item in logged(tmp_path)] == [1, 2, 3]
    assert records(tmp_path, "exit")[0]["exit_code"] == 1


def test_server_that_never_answers_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The online run is kept offline when the server is silent; `line` never waits, `close` not longer than it may."""
    with silence(monkeypatch) as connections:
        tracker, said = follow(tmp_path, mode="online", init_seconds=60.0, close_seconds=2.0)
        assert within(60, lambda: len(connections) > 0)
        began = time.monotonic()
        for step in range(1, 2001):
            tracker.step(train_line(step), ["row"])
        assert time.monotonic() - began < 2.0
        began = time.monotonic()
        tracker.close("done")
        assert 1.9 < time.monotonic() - began < 4.0
    assert len(said) == 1
    assert "did not finish in 2 s" in said[0]
    assert (tmp_path / METRICS).read_text().count("\n") == 2000


def test_a_failed_run_does_not_wait_for_a_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks have to hear of the failure; the W&B process ends by itself."""
    with silence(monkeypatch) as connections:
        tracker, _ = follow(tmp_path, mode="online", init_seconds=60.0, close_seconds=1.0)
        assert within(60, lambda: len(connections) > 0)
        tracker.step(train_line(1), ["row"])
        began = time.monotonic()
        tracker.close("failed")
        assert time.monotonic() - began < 0.5


@pytest.mark.long  # wandb takes 13 s to give its failed run up
def test_unreachable_server_keeps_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with silence(monkeypatch):
        tracker, said = follow(tmp_path, mode="online", init_seconds=1.0, close_seconds=90.0)
        for step in range(1, 4):
            tracker.step(train_line(step), ["row"])
        tracker.close("done")
    assert len(said) == 1
    assert "kept offline" in said[0]
    assert [item[STEP] for item in logged(tmp_path)] == [1, 2, 3]


def test_broken_wandb_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    (broken / "wandb").mkdir(parents=True)
    (broken / "wandb" / "__init__.py").write_text("raise ImportError('protobuf is too old')\n")
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{broken}:{root}")
    tracker, said = follow(tmp_path)
    process = tracker.sinks[0]
    assert isinstance(process, WandbProcess)
    process._child.wait(60)
    for step in range(1, 4):
        tracker.step(train_line(step), ["row"])
    tracker.close("done")
    assert len(said) == 1
    assert "protobuf is too old" in said[0]
    assert (tmp_path / METRICS).read_text().count("\n") == 3


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    tracker, _ = follow(tmp_path, mode="disabled")
    assert tracker.sinks == ()
    assert not (tmp_path / SPEC).exists()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_offline_opens_no_network_socket(tmp_path: Path) -> None:
    tracker, _ = follow(tmp_path)
    tracker.step(train_line(1), ["row"])
    tracker.close("done")
    trace = tmp_path / "trace"
    # Once more under strace, on the finished file: the parent is gone for it, so it reads, logs and ends.
    spec = json.loads((tmp_path / SPEC).read_text())
    (tmp_path / SPEC).write_text(json.dumps({**spec, "offset": 0}))
    command = ["strace", "-f", "-qq", "-e", "trace=socket,connect", "-o", str(trace)]
    command += [sys.executable, "-m", "sftdist.training.wandb_sink", str(tmp_path / SPEC)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)
    sockets = trace.read_text().splitlines()
    assert any("AF_UNIX" in line for line in sockets)
    assert not [line for line in sockets if "AF_INET" in line]


def test_wandb_id_is_stable_and_takes_any_name() -> None:
    assert wandb_id("chat_small-0a1b2c3d") == "chat_small-0a1b2c3d"
    assert wandb_id("a b/c") == wandb_id("a b/c")
    assert len({wandb_id("a b/c"), wandb_id("a-b/c"), wandb_id("a-b-c"), wandb_id("x" * 80), wandb_id("x" * 81)}) == 5
    assert all(len(wandb_id(name)) <= 64 and not set(wandb_id(name)) & set("/\\#?%: ") for name in ("a b/c", "é" * 90))


def test_key_is_found_where_wandb_looks(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    none = {"NETRC": str(file)}
    assert not has_key(none)
    file.write_text("machine other.host login user password x\n")
    assert not has_key(none)
    assert has_key({**none, "WANDB_BASE_URL": "https://other.host"})
    file.write_text("machine api.wandb.ai login user password x\n")
    assert has_key(none)
    assert has_key({"WANDB_API_KEY": "x", "NETRC": "/nowhere"})


def _found(run_dir: Path, step: int, value: float) -> None:
    (run_dir / WATCHED).parent.mkdir(exist_ok=True)
    better = {BETTER: {"general.exact_match": True}}
    append_jsonl(run_dir / WATCHED, [{"kind": "probe", "step": step, "general.exact_match": value, **better}])


def test_what_a_watch_finds_goes_into_the_same_run_once(tmp_path: Path) -> None:
    """Found while it trains, after it was preempted, and after it was done: three processes, each line once."""
    tracker, said = follow(tmp_path)
    assert not has_unlogged(tmp_path)
    tracker.step(train_line(1), ["row"])
    _found(tmp_path, 1, 0.25)
    tracker.close("done")
    assert not has_unlogged(tmp_path)
    _found(tmp_path, 2, 0.5)
    assert has_unlogged(tmp_path)
    follow(tmp_path, resumed_step=1)[0].close("done")
    assert said == []
    assert not has_unlogged(tmp_path)
    starts = [read(folder) for folder in runs_of(tmp_path)]
    assert [
        [(item["probe/step"], item["probe/general.exact_match"]) for item in history(start) if "probe/step" in item]
        for start in starts
    ] == [[(1, 0.25)], [(2, 0.5)]]
    axes = [record for start in starts for record in of_kind(start, "metric") if "probe/" in str(record)]
    assert all("probe/step" in str(axis) for axis in axes)
    assert len(axes) == 2
