"""The rules for what a user brings along by import path: names or paths, and arguments that somebody takes."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

from sftdist.core.extension import is_import_path
from sftdist.core.settings import OptimizerName, OptimizerSettings, Schedule, TrainConfig
from sftdist.core.typed import shown

OF_OURS = ("betas", "eps", "momentum")  # what only the optimizers of ours take


def own_code_issues(cfg: TrainConfig) -> Iterator[str]:
    """Every issue of the keys that take an import path; whether there is something behind it is found elsewhere."""
    optimizer, train = cfg.optimizer, cfg.train
    yield from _named("optimizer.name", optimizer.name, OptimizerName, "args", optimizer.args)
    yield from _named("optimizer.schedule", optimizer.schedule, Schedule, "schedule_args", optimizer.schedule_args)
    if is_import_path(optimizer.name):
        yield from _of_ours(optimizer)
    if train.loss is None and train.loss_args:
        yield f"train.loss_args: given {shown(train.loss_args)} without train.loss, which would take them; remove them"
    paths = {"train.loss": [train.loss] if train.loss is not None else []}
    for key, values in {**paths, "train.hooks": train.hooks, "tracking.sinks": cfg.tracking.sinks}.items():
        for value in values:
            if not is_import_path(value):
                yield f"{key}: given {shown(value)}, required package.module:name"
        if len(set(values)) != len(values):
            yield f"{key}: given {shown(values)}, required each of them once"


def _named(key: str, value: str, ours: type[StrEnum], args_name: str, args: dict[str, Any]) -> Iterator[str]:
    if is_import_path(value):
        return
    names = list(ours)
    if value not in names:
        close = get_close_matches(value, names, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        yield f"{key}: given {shown(value)}, required one of {', '.join(names)}, or package.module:name{meant}"
    elif args:
        section = key.partition(".")[0]
        yield (
            f"{section}.{args_name}: given {shown(args)} with {key}={value}, which takes none; remove them, or give "
            f"{key}=package.module:name"
        )


def _of_ours(optimizer: OptimizerSettings) -> Iterator[str]:
    """They would be ignored, and whoever has set them would not know."""
    default = OptimizerSettings()
    given = {"betas": optimizer.betas, "eps": optimizer.eps, "momentum": optimizer.momentum}
    before = {"betas": default.betas, "eps": default.eps, "momentum": default.momentum}
    for name in OF_OURS:
        if given[name] != before[name]:
            yield (
                f"optimizer.{name}: given {shown(given[name])} with optimizer.name={optimizer.name}, which would not "
                f"get it; required {name} in optimizer.args, as that optimizer calls it"
            )
