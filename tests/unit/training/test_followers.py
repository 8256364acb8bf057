"""Trackers and hooks run beside the training: what they get, and that nothing they do is felt there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.settings import TrainConfig
from sftdist.training import followers
from sftdist.training.followers import MODULE, Follower, followers_of, require_followers
from sftdist.training.tracking import open_tracker

OWN = """
import json
import time
from pathlib import Path


class Keeps:
    def __init__(self, run_dir, config, step):
        self.file = run_dir / "kept.txt"
        self.say("made", config["run"]["name"], step)

    def say(self, *words):
        with self.file.open("a") as file:
            print(*words, file=file)

    def line(self, line):
        self.say("line", line["kind"], line["step"])

    def close(self, state):
        self.say("close", state)


class Watches:
    def __init__(self, run_dir, config, step):
        self.file = run_dir / "watched.txt"

    def say(self, *words):
        with self.file.open("a") as file:
            print(*words, file=file)

    def after_step(self, step, line):
        self.say("step", step, line["loss"])

    def after_checkpoint(self, step, folder):
        self.say("checkpoint", step, (folder / "state.json").is_file())


class Raises:
    def __init__(self, run_dir, config, step):
        pass

    def line(self, line):
        raise ValueError("no such project")


class Hangs(Raises):
    def line(self, line):
        time.sleep(600)


class Empty:
    def __init__(self, run_dir, config, step):
        pass


def makes_nothing(run_dir, config, step):
    return Empty(run_dir, config, step)


def short(run_dir):
    return Empty(run_dir, {}, 0)
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_followers.py").write_text(OWN)
    (tmp_path / "run").mkdir()
    yield tmp_path / "run"
    sys.modules.pop("own_followers", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def config(sinks: str = "", hooks: str = "") -> TrainConfig:
    words = ("model.path=model", "data.train=my.jsonl", "run.name=mine")
    return compose("lora", [*words, f"tracking.sinks=[{sinks}]", f"train.hooks=[{hooks}]"])


def train_line(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.0 / step}


def publish(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (run_dir / "LATEST").write_text(f"checkpoints/{folder.name}\n")


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_tracker_gets_every_line_and_the_end(run_dir: Path) -> None:
    tracker = open_tracker(run_dir, resumed_step=0)
    tracker = tracker.followed_by(*followers_of(config("own_followers:Keeps"), run_dir, 0, print))
    tracker.report(train_line(1))
    tracker.report({"kind": "eval", "step": 1, "eval/loss": 2.0})
    tracker.report(train_line(2))
    tracker.close("done")
    said = ["made mine 0", "line train 1", "line eval 1", "line train 2", "close done"]
    assert (run_dir / "kept.txt").read_text().splitlines() == said


def test_a_resumed_one_begins_where_the_run_goes_on(run_dir: Path) -> None:
    tracker = open_tracker(run_dir, resumed_step=0)
    for step in (1, 2, 3):
        tracker.report(train_line(step))
    tracker.close("preempted")
    tracker = open_tracker(run_dir, resumed_step=2)
    tracker = tracker.followed_by(*followers_of(config("own_followers:Keeps"), run_dir, 2, print))
    tracker.report(train_line(3))
    tracker.close("preempted")
    assert (run_dir / "kept.txt").read_text().splitlines() == ["made mine 2", "line train 3", "close preempted"]


def test_a_hook_is_told_of_steps_and_of_published_checkpoints(run_dir: Path) -> None:
    publish(run_dir, 1)  # of before: the run goes on from there
    tracker = open_tracker(run_dir, resumed_step=1)
    tracker = tracker.followed_by(*followers_of(config(hooks="own_followers:Watches"), run_dir, 1, print))
    tracker.report(train_line(2))
    tracker.report({"kind": "eval", "step": 2, "eval/loss": 2.0})
    (run_dir / "checkpoints/step-00000004.tmp").mkdir()
    publish(run_dir, 2)
    until(
        lambda: "checkpoint 2" in ((run_dir / "watched.txt").read_text() if (run_dir / "watched.txt").exists() else "")
    )
    publish(run_dir, 3)
    tracker.close("done")
    said = ["step 2 0.5", "checkpoint 2 True", "checkpoint 3 True"]
    assert (run_dir / "watched.txt").read_text().splitlines() == said


def test_one_that_raises_costs_a_line_and_nothing_else(run_dir: Path) -> None:
    said: list[str] = []
    tracker = open_tracker(run_dir, resumed_step=0)
    (one,) = followers_of(config("own_followers:Raises"), run_dir, 0, said.append)
    tracker = tracker.followed_by(one)
    tracker.report(train_line(1))
    until(lambda: one._child.poll() is not None)
    tracker.report(train_line(2))
    tracker.report(train_line(3))
    tracker.close("done")
    (line,) = said
    assert line.startswith("tracking.sinks: own_followers:Raises stopped (ValueError: no such project, see ")
    assert line.endswith("; training goes on; metrics.jsonl has every figure")
    assert "Traceback" in (run_dir / "log/own_followers-Raises.log").read_text()


def test_one_that_hangs_is_stopped(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(followers.CLOSE_SECONDS, "tracking.sinks", 2.0)
    said: list[str] = []
    tracker = open_tracker(run_dir, resumed_step=0)
    (one,) = followers_of(config("own_followers:Hangs"), run_dir, 0, said.append)
    tracker = tracker.followed_by(one)
    began = time.monotonic()
    tracker.report(train_line(1))
    tracker.close("done")
    assert time.monotonic() - began < 20
    assert one._child.returncode is not None
    assert said == [
        "tracking.sinks: own_followers:Hangs did not finish in 2 s and was stopped; metrics.jsonl has every figure"
    ]


def test_it_ends_with_the_trainer(run_dir: Path) -> None:
    """A trainer that is killed says nothing: its follower hears it, and closes."""
    tracker = open_tracker(run_dir, resumed_step=0)
    (one,) = followers_of(config("own_followers:Keeps"), run_dir, 0, print)
    until((run_dir / "kept.txt").exists)
    assert one._child.stdin is not None
    one._child.stdin.close()  # as the system does
    assert one._child.wait(timeout=60) == 0
    assert (run_dir / "kept.txt").read_text().splitlines()[-1] == "close crashed"
    tracker.close("failed")


def test_after_a_failure_nobody_waits(run_dir: Path) -> None:
    tracker = open_tracker(run_dir, resumed_step=0)
    (one,) = followers_of(config("own_followers:Keeps"), run_dir, 0, print)
    until((run_dir / "kept.txt").exists)
    one.close("failed")
    assert one._child.wait(timeout=60) == 0
    assert (run_dir / "kept.txt").read_text().splitlines()[-1] == "close failed"
    tracker.close("failed")


@pytest.mark.parametrize(
    ("sinks", "hooks", "said"),
    [
        ("own_followers:Nothing", "", "tracking.sinks: given own_followers:Nothing, required a name that is in"),
        ("no_such_tracker:T", "", "tracking.sinks: .* required a module that imports: No module named"),
        ("own_followers:Empty", "", r"tracking.sinks: .* required a class with the method line\(line\)"),
        ("", "own_followers:Keeps", r"train.hooks: .* required a class with the method after_step\(step, line\) or"),
        (
            "",
            "own_followers:short",
            r"train.hooks: .* required a class or function \(run_dir, config, step\); too many",
        ),
    ],
)
def test_what_is_none_is_refused_before_the_training(run_dir: Path, sinks: str, hooks: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        require_followers(config(sinks, hooks))


def test_a_function_that_makes_none_says_so_in_its_log(run_dir: Path) -> None:
    said: list[str] = []
    tracker = open_tracker(run_dir, resumed_step=0)
    followers_here = followers_of(config("own_followers:makes_nothing"), run_dir, 0, said.append)
    tracker.followed_by(*followers_here).close("done")
    assert "makes_nothing made Empty, required the method line(line)" in said[0]


def test_no_follower_pays_for_torch(run_dir: Path) -> None:
    line = f"import sys, {MODULE}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True, env={**os.environ})
    assert found.stdout.strip() == "False"
    assert Follower.__module__ == followers.__name__
