"""`sftdist plan`: memory per GPU, step time and the whole job's GPU-hours, before anything is rented; it loads no
weights."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sftdist.assets import quickstart
from sftdist.core import config
from sftdist.core.settings import Method, PlanConfig
from sftdist.core.storage import write_text
from sftdist.data.packing import deal
from sftdist.data.pipeline import Prepared
from sftdist.data.plan import Plan, PlanTotals
from sftdist.data.planned import pack_tokens
from sftdist.data.request import prepare_small, request_of
from sftdist.model import cost, timing
from sftdist.model.hardware import Cluster, named
from sftdist.training.choices import (
    Choice,
    choice,
    choices,
    fastest_that_fits,
    proposals,
    require_shape,
    typical_step,
)
from sftdist.training.dry_run import planned
from sftdist.training.plan_view import PlanResult, Scale, as_json, lines, page, scaling_svg
from sftdist.training.planned_model import planned_config

SAMPLE = 16  # steps of the real plan whose packs are looked at one by one


@dataclass(frozen=True)
class Work:
    """The steps to predict. `at(gpus, grown)`: a step on so many GPUs, its packs times `grown`. `totals`: of the whole
    job, None without data; `why`: the reason."""

    at: Callable[[int, int], timing.Step]
    totals: PlanTotals | None
    why: str | None


def run(cfg: PlanConfig, say: Callable[[str], None] = print) -> PlanResult:
    """Arithmetic on the model's config and, where there is data, on the real plan."""
    quickstart.lay_out(cfg)
    shape = planned_config(cfg, cfg.model.vocabulary or 0).to_dict()
    require_shape(cfg, shape)
    gpu = named(cfg.cluster.gpu)
    gpu = gpu if cfg.cluster.memory_gib is None else replace(gpu, memory_gib=cfg.cluster.memory_gib)
    counts = cfg.cluster.gpus if isinstance(cfg.cluster.gpus, list) else [cfg.cluster.gpus]
    work = work_of(cfg, shape, planned(cfg, partial(_ready, cfg, say)))
    budget = gpu.memory_gib * cost.GIB

    def cluster(gpus: int) -> Cluster:
        return Cluster(gpu, gpus, cfg.cluster.gpus_per_node, cfg.cluster.network_gbps * 1e9 / 8)

    first = counts[0]
    configured = choice(cfg, shape, cluster(first), work.at(first, 1), budget)
    best = fastest_that_fits(cfg, shape, cluster(first), work.at(first, 1), budget)
    found = with_rows(choices(cfg, shape, cluster(first), work.at(first, 1), budget), configured, best)
    scaling = []
    for gpus in counts:
        there = fastest_that_fits(cfg, shape, cluster(gpus), work.at(gpus, 1), budget)
        grown = max(1, round(gpus / first))
        weak = None if there is None else choice(there.cfg, shape, cluster(gpus), work.at(gpus, grown), budget)
        scaling.append(Scale(gpus, work.at(gpus, 1), there, work.at(gpus, grown), weak))
    instead = [] if best is not None else list(proposals(cfg, shape, cluster(first), work.at(first, 1), budget))
    total = cost.parameters(shape).total
    return PlanResult(
        exp=cfg.exp,
        gpu=gpu,
        pack_tokens=pack_tokens(cfg),
        parameters=total,
        outside_text=cost.outside_text(shape),
        trainable=total if cfg.tune.method == Method.full else cost.lora_parameters(shape, cfg.tune.r),
        method=cfg.tune.method.value,
        precision=cfg.precision.value,
        choices=tuple(found),
        configured=configured,
        best=best,
        scaling=tuple(scaling),
        proposals=tuple(instead),
        totals=work.totals,
        why_no_totals=work.why,
    )


def with_rows(found: list[Choice], *more: Choice | None) -> list[Choice]:
    """The choices in the order of the table, with those besides that are not among them."""
    for one in more:
        if one is not None and not any(one.is_like(other) for other in found):
            found.append(one)
    return sorted(found, key=lambda one: (one.cfg.zero.stage, str(one.cfg.zero.offload), one.recomputed))


def work_of(cfg: PlanConfig, shape: Mapping[str, Any], found: tuple[Any, Plan] | str) -> Work:
    """From the real plan: its totals and the packs of its first steps; else full packs of long conversations."""
    if isinstance(found, str):
        typical = typical_step(cfg, shape)
        return Work(lambda gpus, grown: replace(typical, packs=typical.packs * grown), None, found)
    plan = found[1]
    totals = plan.totals()
    terms = cost.attention_terms(shape)
    lengths = [[pack.length.tolist() for pack in step.packs] for step in islice(plan.steps_from(), SAMPLE)]
    pairs = [
        [sum(flops * cost.visible_pairs(n, window) for n in pack for flops, window in terms) for pack in step]
        for step in lengths
    ]
    costs = [[float(plan.cost.of(np.array(pack)).sum()) for pack in step] for step in lengths]

    def at(gpus: int, grown: int) -> timing.Step:
        packs = round(totals.packs / totals.steps) * grown
        balance = float(np.mean([_balance(step * grown, gpus) for step in costs]))
        return timing.Step(
            packs=packs,
            tokens=totals.tokens / totals.packs,
            pairs=float(np.mean([pack for step in pairs for pack in step])),
            supervised=totals.targets / totals.packs,
            balance=balance,
        )

    return Work(at, totals, None)


def _balance(costs: list[float], ranks: int) -> float:
    """Mean over largest cost of the packs of those ranks that have the most: what `Step.micro` does not say already."""
    dealt = deal(costs, ranks)
    loads = np.where(dealt < 0, 0.0, np.array(costs)[dealt]).sum(axis=1)
    micro = -(-len(costs) // ranks)
    return min(1.0, micro * float(np.mean(costs)) / float(loads.max()))


def _ready(cfg: PlanConfig, say: Callable[[str], None]) -> Prepared:
    """The stores, found or made where that is quick."""
    command = f"sftdist prepare {shlex.join(word for word in sys.argv[1:] if '=' in word)}"
    return prepare_small(request_of(cfg.data, cfg.model), command, say)


def command(cfg: PlanConfig) -> int:
    result = run(cfg, partial(print, file=sys.stderr, flush=True))
    text = json.dumps(as_json(result), indent=2)
    print(text if cfg.output == "json" else "\n".join(lines(result)))
    if cfg.file is not None:
        path = Path(cfg.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = {".json": lambda: text, ".svg": lambda: scaling_svg(result), ".html": lambda: page(result)}
        write_text(path, written[path.suffix]())
        print(f"written: {path}", file=sys.stderr)
    return 0


def known_gpu(cfg: PlanConfig) -> list[str]:
    """An unknown GPU is an issue among the others."""
    try:
        named(cfg.cluster.gpu)
    except config.ConfigError as error:
        return error.issues
    return []


def main() -> int:
    """The command line: `sftdist plan +exp=X cluster.gpus=8 cluster.gpu=h100`."""
    return config.main(PlanConfig, command, "plan", checks=[known_gpu])


if __name__ == "__main__":
    sys.exit(main())
