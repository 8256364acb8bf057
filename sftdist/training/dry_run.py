"""What a run would do: its size and its plan, without weights, ranks or a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from sftdist.core import agent, snapshot
from sftdist.core.errors import ConfigError, DataAbsentError
from sftdist.core.settings import TrainConfig
from sftdist.data.corpus import Corpus, overlong_lines
from sftdist.data.pipeline import Prepared
from sftdist.data.plan import Plan
from sftdist.data.planned import corpus_of, plan_spec
from sftdist.data.summary import describe_plan
from sftdist.model import cost
from sftdist.training.build import memory_setup, planned_trainable
from sftdist.training.choices import require_shape
from sftdist.training.planned_model import cost_model, planned_config


def print_plan(cfg: TrainConfig, ready: Callable[[], Prepared]) -> None:
    """`dry_run`: what the run would do, counted where its data is there; `ready` finds or makes the stores."""
    print(f"configuration {snapshot.config_hash(cfg)[:12]} is complete; run directory {cfg.run.dir}")
    shape = planned_config(cfg, cfg.model.vocabulary or 0).to_dict()
    require_shape(cfg, shape)
    device, trainable = ("cuda" if torch.cuda.is_available() else "cpu"), planned_trainable(cfg, shape)
    setup = memory_setup(cfg, stage=cfg.zero.stage, world=ranks(cfg), trainable=trainable, device=device)
    need = cost.total(cost.memory(shape, setup)) / cost.GIB
    print(f"{cost.parameters(shape).total:,} parameters, about {need:.1f} GiB on each of {ranks(cfg)} ranks")
    found = planned(cfg, ready)
    if isinstance(found, str):
        print(f"no plan of the steps yet: {found}", flush=True)
        return
    corpus, plan = found
    for line in (*overlong_lines(corpus, cfg.data.max_len), *describe_plan(plan, plan.totals(), ranks(cfg))):
        print(line, flush=True)


def planned(cfg: TrainConfig, ready: Callable[[], Prepared]) -> tuple[Corpus, Plan] | str:
    """The real plan over the stores that `ready` finds or makes, or why there is none yet."""
    try:
        prepared = ready()
    except (DataAbsentError, ConfigError) as error:
        # A preset that brings its own shape is planned without its weights and tokenizer, which may be out of reach.
        if isinstance(error, ConfigError) and cfg.model.shape is None:
            raise
        return str(error)
    corpus = corpus_of(cfg, prepared)
    exact = planned_config(cfg, len(corpus.template.tokenizer))
    return corpus, Plan(corpus.tables, plan_spec(cfg), cost_model(exact, cfg.tune, corpus.supervised_share))


def ranks(cfg: TrainConfig) -> int:
    """How many ranks this command would train on."""
    return int(os.environ.get("WORLD_SIZE", agent.ranks_here(cfg.launch.nproc)))
