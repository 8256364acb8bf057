"""The figures of a run for MLflow: `tracking.sinks=[sftdist.examples.mlflow_tracker:Mlflow]`.

Needs `pip install 'sftdist[mlflow]'`. `MLFLOW_TRACKING_URI` says where the figures go; without it they stay in the run
directory, in `mlflow.db`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

try:
    import mlflow
except ImportError as missing:
    raise ImportError(f"{missing}; pip install 'sftdist[mlflow]'") from missing

MARK = "log/mlflow-run.txt"  # which MLflow run this is: a resumed run goes on in it
ENDED = {"done": "FINISHED", "preempted": "KILLED"}
LONGEST, AT_ONCE = 500, 100  # characters of a parameter, parameters in a call


class Mlflow:
    """One MLflow run for a run directory, in the experiment `tracking.project`; the configuration as its parameters."""

    def __init__(self, run_dir: Path, config: dict[str, Any], step: int) -> None:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{run_dir.resolve() / 'mlflow.db'}")
        mlflow.set_experiment(config["tracking"]["project"])
        mark = run_dir / MARK
        if mark.is_file():
            mlflow.start_run(run_id=mark.read_text(encoding="utf-8").strip())
            return
        run = mlflow.start_run(run_name=config["run"]["name"])
        mark.write_text(run.info.run_id + "\n", encoding="utf-8")
        rest = flat(config)
        while batch := dict(islice(rest, AT_ONCE)):
            mlflow.log_params(batch)

    def line(self, line: dict[str, Any]) -> None:
        numbers = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        mlflow.log_metrics({name: value for name, value in numbers.items() if name != "step"}, step=line["step"])

    def close(self, state: str) -> None:
        mlflow.end_run(ENDED.get(state, "FAILED"))


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with their values as text."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:LONGEST]
