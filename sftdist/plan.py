"""`sftdist plan`: parameters, FLOPs and memory per GPU, before anything is rented; it loads no weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from sftdist.assets import quickstart
from sftdist.core import config
from sftdist.core.settings import PlanConfig
from sftdist.model import cost
from sftdist.training.build import memory_setup, planned_trainable
from sftdist.training.planned_model import planned_config

GIB = 2**30
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class PlanResult:
    """`memory`: bytes per GPU by part, for each ZeRO stage; `fits` and `fixes` for the configured stage."""

    parameters: int
    trainable: int
    flops_per_token: float
    attention_flops: float
    memory: dict[int, dict[str, float]]
    fits: bool
    fixes: list[str] | None


def run(cfg: PlanConfig) -> PlanResult:
    """Arithmetic on the model's config, for `cluster.gpus` GPUs of `cluster.memory_gib`."""
    quickstart.lay_out(cfg)
    shape = planned_config(cfg, cfg.model.vocabulary or 0).to_dict()
    trainable = planned_trainable(cfg, shape)
    gpus = cfg.cluster.gpus
    setups = {stage: memory_setup(cfg, stage=stage, world=gpus, trainable=trainable) for stage in STAGES}
    budget = cfg.cluster.memory_gib * GIB
    fixes = cost.cheapest_overrides(shape, setups[cfg.zero.stage], budget, max_len=cfg.data.max_len, lora_r=cfg.tune.r)
    total = cost.parameters(shape).total
    dense, attention = cost.train_factors(cfg.tune.method.value)
    longest = cfg.data.max_len
    pairs = sum(flops * cost.visible_pairs(longest, window) for flops, window in cost.attention_terms(shape))
    return PlanResult(
        parameters=total,
        trainable=total if trainable is None else trainable,
        flops_per_token=dense * (cost.dense_flops(shape) + cost.head_flops(shape)),
        attention_flops=attention * pairs,
        memory={stage: cost.memory(shape, setup) for stage, setup in setups.items()},
        fits=fixes == [],
        fixes=fixes,
    )


def show(cfg: PlanConfig, result: PlanResult, console: Console) -> None:
    console.print(
        f"{result.parameters:,} parameters, {result.trainable:,} trained; training FLOPs: {result.flops_per_token:.3g} "
        f"per supervised token, and {result.attention_flops:.3g} for the attention of one conversation of "
        f"{cfg.data.max_len:,} tokens"
    )
    console.print(memory_table(cfg, result.memory))
    where = f"{cfg.cluster.gpus} GPUs of {cfg.cluster.memory_gib:g} GiB, zero.stage={cfg.zero.stage}"
    if result.fits:
        console.print(f"{where}: fits")
    elif result.fixes:
        overrides = " ".join(result.fixes)
        console.print(f"{where}: does not fit; the cheapest overrides that would: {overrides}", soft_wrap=True)
    else:
        console.print(f"{where}: does not fit with any setting here; more or larger GPUs are needed", soft_wrap=True)


def memory_table(cfg: PlanConfig, memory: Mapping[int, Mapping[str, float]]) -> Table:
    table = Table(title="Memory per GPU in GiB (total: with 10 % and 1.5 GiB for fragments and the device)")
    parts = list(next(iter(memory.values())))
    for heading in ("zero.stage", *parts, "total"):
        table.add_column(heading, justify="right")
    for stage, values in memory.items():
        total = cost.total(values)
        style = "bold" if stage == cfg.zero.stage else None
        cells = [f"{values[part] / GIB:.2f}" for part in parts]
        table.add_row(str(stage), *cells, f"{total / GIB:.2f}", style=style)
    return table


def command(cfg: PlanConfig) -> int:
    show(cfg, run(cfg), Console(highlight=False))
    return 0


def main() -> int:
    """The command line: `sftdist plan +exp=X cluster.gpus=8 cluster.memory_gib=80`."""
    return config.main(PlanConfig, command, "plan")


if __name__ == "__main__":
    sys.exit(main())
