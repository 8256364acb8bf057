"""Benchmarks of lm-eval for the tuned model and its base, document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, util
from pathlib import Path

import torch

from sftdist.core.errors import ConfigError, DataError
from sftdist.evals.backends.hf import load_model
from sftdist.evals.decoding import Decoding
from sftdist.evals.report import Scores
from sftdist.evals.voice import Voice
from sftdist.evals.waiting import Beat, quiet

SOURCE = "benchmarks"
# Metrics of lm-eval that are a share of something; others have no bound that is known here.
SHARES = frozenset({"acc", "acc_norm", "acc_mutual_info", "acc_bytes", "exact_match", "em", "f1", "contains"})


@dataclass(frozen=True)
class Measured:
    """One metric of a task: ids of documents, their values and the hashes of what was asked, in the same order."""

    task: str
    metric: str
    ids: list[str]
    values: list[float]
    asked: list[str]
    higher_is_better: bool | None


@dataclass(frozen=True)
class Benchmarked:
    """`benchmarks.<task>.<metric>`, and for each document the hash of what was asked and of what is right."""

    metrics: dict[str, Scores] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)


def benchmarks(
    folders: Mapping[str, Path],
    tasks: Sequence[str],
    voice: Voice,
    decoding: Decoding,
    device: torch.device,
    beat: Beat = quiet,
) -> Benchmarked:
    """What the models `tuned` and `base` (if there is one) make of the tasks, by transformers.

    Both are asked the same text, through the tuned model's template; `beat` is called after each forward. Raises
    ConfigError where lm-eval is not installed or a task is unknown, DataError where one cannot be run.
    """
    if not tasks:
        return Benchmarked()
    require_lm_eval(tasks)
    # By name: the file imports lm_eval, which is not there everywhere.
    run_tasks = import_module("sftdist.evals.backends.lm_eval").run_tasks
    found: dict[str, dict[str, Measured]] = {}
    for name, folder in folders.items():
        model = load_model(folder, dtype=decoding.dtype, device=device, rows=voice.rows)
        model.register_forward_hook(lambda *_: beat())
        found[name] = run_tasks(
            model.eval(), voice, tasks, batch_size=decoding.batch_size, max_new_tokens=decoding.max_new_tokens
        )
    base = found.get("base")
    metrics = {
        f"{SOURCE}.{metric}": _scores(metric, of_tuned, None if base is None else base[metric])
        for metric, of_tuned in found["tuned"].items()
    }
    return Benchmarked(
        metrics, {id: asked for one in found["tuned"].values() for id, asked in zip(one.ids, one.asked, strict=True)}
    )


def require_lm_eval(tasks: Sequence[str], *, asked: bool = False) -> None:
    """Raises ConfigError where there are tasks and lm-eval is not installed, or where tasks are `asked` for and there
    is none."""
    if tasks and util.find_spec("lm_eval") is None:
        raise ConfigError(
            "tasks: lm-eval is not installed; install it with pip install 'sftdist[evals]', or leave tasks out"
        )
    if asked and not tasks:
        raise ConfigError("tasks: given none, required the tasks of evals=lm_eval, such as tasks=[gsm8k,FILE.yaml]")


def _scores(metric: str, tuned: Measured, base: Measured | None) -> Scores:
    if base is not None and base.ids != tuned.ids:
        raise DataError(f"tasks: {metric} has {len(tuned.ids)} documents of the tuned model and {len(base.ids)} others")
    low, high = (0.0, 1.0) if tuned.metric in SHARES else (None, None)
    return Scores(
        ids=tuned.ids,
        tuned=tuned.values,
        base=None if base is None else base.values,
        higher_is_better=tuned.higher_is_better,
        low=low,
        high=high,
        meaning=f"mean {tuned.metric} over the documents of lm-eval's task {tuned.task}",
    )
