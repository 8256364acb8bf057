"""The learning rate of each update: a schedule of ours in closed form, or one of the user's own by import path."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from sftdist.core.errors import ConfigError, TrainingError
from sftdist.core.extension import is_import_path, load_function, raised, require_call
from sftdist.core.settings import OptimizerSettings
from sftdist.training.optimizer import lr_at

KEY = "optimizer.schedule"
FORM = "a function (step, total, warmup, min_ratio, **optimizer.schedule_args) -> share of optimizer.lr"
TRIED = 200  # updates of a run that are tried before it


def rate_of(settings: OptimizerSettings, steps: int) -> Callable[[int], float]:
    """The learning rate of update number k, counted from 0, of a run of `steps`.

    Raises ConfigError for a schedule of the user's own that is none; the rate raises TrainingError where it fails.
    """
    warmup = round(settings.warmup_ratio * steps)
    if is_import_path(settings.schedule):
        own = OwnSchedule(settings.schedule, settings.schedule_args, steps, warmup, settings.min_lr_ratio)
        own.require_sound()
        return lambda step: settings.lr * own(step)
    return partial(
        lr_at,
        lr=settings.lr,
        total=steps,
        warmup=warmup,
        schedule=settings.schedule,
        min_ratio=settings.min_lr_ratio,
    )


class OwnSchedule:
    """A user's function (step, total, warmup, min_ratio, **args) -> the share of the peak rate, 0 or more.

    It has to be a pure one: a resumed run asks it for the rates of the steps that are left, and every rank asks it.
    """

    def __init__(self, path: str, args: dict[str, Any], total: int, warmup: int, min_ratio: float) -> None:
        self._path, self._args, self._total = path, args, total
        self._rest = (total, warmup, min_ratio)
        self._call = require_call(load_function(path, KEY), path, KEY, FORM, 0, *self._rest, **args)

    def __call__(self, step: int) -> float:
        """Raises TrainingError where the function raises or gives no share."""
        return self._share(step, TrainingError)

    def require_sound(self) -> None:
        """Try it at many of the run's updates, each twice. Raises ConfigError."""
        for step in range(0, self._total, max(1, self._total // TRIED)):
            first, again = self._share(step, ConfigError), self._share(step, ConfigError)
            if first != again:
                raise ConfigError(
                    f"{KEY}: {self._path} gave {first} and then {again} for step {step}, required the same each time: "
                    "a function of its arguments alone"
                )

    def _share(self, step: int, kind: type[ConfigError] | type[TrainingError]) -> float:
        try:
            found = self._call(step, *self._rest, **self._args)
            share = float(found)
        except Exception as problem:  # whatever the user's code raises
            raise kind(
                f"{KEY}: {self._path} raised {raised(problem)} at step {step} of {self._total}; required {FORM}"
            ) from problem
        if not (math.isfinite(share) and share >= 0):
            raise kind(f"{KEY}: {self._path} gave {share} at step {step}, required a share of optimizer.lr, 0 or more")
        return share
