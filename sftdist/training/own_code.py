"""All that a run's configuration brings along by import path, looked at before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.core.extension import is_import_path
from sftdist.core.settings import TrainConfig
from sftdist.model.own_loss import load_loss
from sftdist.training.build import optimizer_spec
from sftdist.training.followers import require_followers
from sftdist.training.optimizer import stage_issues
from sftdist.training.schedule import OwnSchedule


def own_code_found(cfg: TrainConfig) -> list[str]:
    """What is wrong with the user's own optimizer, schedule, loss, hooks and trackers; one line each.

    The optimizer takes its few steps; a schedule and a loss are tried when the run knows its steps and its vocabulary.
    """
    optimizer, train = cfg.optimizer, cfg.train
    looks: list[Callable[[], Any]] = [lambda: require_followers(cfg)]
    if is_import_path(optimizer.name):
        looks.append(lambda: _refuse(stage_issues(optimizer_spec(cfg), cfg.zero.stage)))
    if is_import_path(optimizer.schedule):
        looks.append(lambda: OwnSchedule(optimizer.schedule, optimizer.schedule_args, 1, 0, 0.0))
    if is_import_path(train.loss):
        looks.append(lambda: load_loss(str(train.loss), train.loss_args))
    return [issue for look in looks for issue in _issues(look)]


def _issues(look: Callable[[], Any]) -> list[str]:
    try:
        look()
    except ConfigError as error:
        return error.issues
    return []


def _refuse(issues: list[str]) -> None:
    if issues:
        raise ConfigError(issues)
