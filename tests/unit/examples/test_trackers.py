"""The shipped trackers write what the real packages read; without the package they say what to install."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

CONFIG = {"run": {"name": "mine", "note": "a try"}, "tracking": {"project": "things"}, "data": {"val": None}}
FIRST = [
    {"kind": "train", "step": 1, "loss": 2.0, "loss/domain": 2.5, "rows": "abc"},
    {"kind": "eval", "step": 1, "eval/loss": 3.0},
    {"kind": "train", "step": 2, "loss": "nan"},
    {"kind": "train", "step": 3, "loss": 1.5},
]
RESUMED = [{"kind": "train", "step": 2, "loss": 1.75}, {"kind": "train", "step": 3, "loss": 1.25}]


def follow_twice(tracker: Any, run_dir: Path) -> None:
    """A run that was preempted after step 3, and resumed from step 1."""
    (run_dir / "log").mkdir(parents=True)
    for step, lines, state in ((0, FIRST, "preempted"), (1, RESUMED, "done")):
        one = tracker(run_dir, CONFIG, step)
        for line in lines:
            one.line(line)
        one.close(state)


def test_tensorboard_reads_the_figures_of_a_resumed_run_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    follow_twice(import_module("sftdist.examples.tensorboard_tracker").TensorBoard, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {
        "loss": [(1, 2.0), (2, 1.75), (3, 1.25)],
        "loss/domain": [(1, 2.5)],
        "eval/loss": [(1, 3.0)],
    }


@pytest.mark.long  # mlflow's database takes several seconds
def test_mlflow_has_one_run_with_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    follow_twice(import_module("sftdist.examples.mlflow_tracker").Mlflow, tmp_path)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("things").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "mine"
    assert run.data.params["run.note"] == "a try"
    history = {(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")}
    assert history == {(1, 2.0), (3, 1.5), (2, 1.75), (3, 1.25)}
    assert run.data.metrics["eval/loss"] == 3.0
    assert (tmp_path / "mlflow.db").is_file()


@pytest.mark.parametrize(("module", "package"), [("tensorboard_tracker", "tensorboard"), ("mlflow_tracker", "mlflow")])
def test_without_the_package_the_extra_is_named(module: str, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import sftdist.examples.{module}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"pip install 'sftdist[{package}]'" in ended.stderr.splitlines()[-1]
