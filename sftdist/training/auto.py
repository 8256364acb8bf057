"""`auto=true`: the fastest setting that fits into this machine's memory, chosen once, before any rank starts.

Only keys are chosen that leave the result as it is: the ZeRO stage, offload and recomputed layers (the same bits, made
twice), and, where nothing else helps, how many logits there are at a time. So a resume, also on another machine, may
choose anew; another chunk of logits rounds differently, and stays what the run began with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch

from sftdist.core import agent, memory, snapshot
from sftdist.core.distributed import is_worker, share_text
from sftdist.core.errors import ConfigError
from sftdist.core.settings import TrainConfig
from sftdist.model import cost
from sftdist.model.hardware import CPU, GPUS, Cluster, recognised
from sftdist.training.choices import (
    KEYS,
    Choice,
    choices,
    fastest_that_fits,
    proposals,
    proposed,
    require_shape,
    typical_step,
    words_of,
)
from sftdist.training.planned_model import planned_config


def settled(cfg: TrainConfig, given: Collection[str], say: Callable[[str], None]) -> TrainConfig:
    """The configuration with what `auto` has chosen; `given`: keys that the command line names, which stay.

    Says in a few lines what was tried. Where all keys are given there is nothing to choose and nothing to say: so
    `sftdist train` hands its choice to its ranks. Raises ConfigError, with LoRA and QLoRA as they would fit, where
    nothing does.
    """
    kept = {key for key in KEYS if any(f"{key}.".startswith(f"{name}.") for name in given)}
    if not cfg.auto or kept >= set(KEYS):
        return cfg
    if (begun := _loss_chunk_of(cfg)) is not None and "model.loss_chunk" not in kept:
        cfg = replace(cfg, model=replace(cfg.model, loss_chunk=begun))
        kept.add("model.loss_chunk")
    cluster, budget = this_machine(cfg)
    shape = planned_config(cfg, cfg.model.vocabulary or 0).to_dict()
    require_shape(cfg, shape)
    step = typical_step(cfg, shape)
    on_gpus = cluster.gpu is not CPU
    tried = choices(cfg, shape, cluster, step, budget, kept, offload=on_gpus)
    best = fastest_that_fits(cfg, shape, cluster, step, budget, kept, offload=on_gpus)
    rank = "CPU rank" if cluster.gpu is CPU else cluster.gpu.name
    where = f"{cluster.gpus} x {rank} with {budget / cost.GIB:.1f} GiB each"
    if best is None:
        instead = [proposed(one) for one in proposals(cfg, shape, cluster, step, budget, offload=on_gpus)]
        raise ConfigError(_nothing_fits(cfg, where, tried, instead))
    for line in _why(best, where, tried, kept):
        say(line)
    return best.cfg


def settled_on_all(cfg: TrainConfig, say: Callable[[str], None]) -> TrainConfig:
    """The same for a caller in Python: as one rank of several, rank 0 chooses and the others hear of it."""
    if not cfg.auto or not is_worker():
        return settled(cfg, (), say)
    if os.environ["RANK"] != "0":
        packed = json.loads(share_text("auto", None))
        if packed is None:
            raise SystemExit(agent.FAILED)  # rank 0 says why
        return snapshot.from_dict(packed, type(cfg))
    try:
        chosen = settled(cfg, (), say)
    except BaseException:
        share_text("auto", "null")
        raise
    share_text("auto", json.dumps(snapshot.to_dict(chosen)))
    return chosen


def chosen_words(cfg: TrainConfig) -> list[str]:
    """The overrides that hold the ranks to what was chosen for them."""
    return words_of(cfg) if cfg.auto else []


def this_machine(cfg: TrainConfig) -> tuple[Cluster, float]:
    """The GPUs that will train, and the bytes that a rank may use: its GPU's, or its part of the host's memory."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", agent.ranks_here(cfg.launch.nproc)))
    ranks = int(os.environ.get("WORLD_SIZE", here * cfg.launch.nodes))
    if not torch.cuda.is_available():
        return Cluster(CPU, ranks, per_node=here), memory.total_bytes() / here
    devices = [torch.cuda.get_device_properties(number) for number in range(min(here, torch.cuda.device_count()))]
    smallest = min(devices, key=lambda device: device.total_memory)
    # The order of settings depends little on which GPU it is: one that is not in the table counts as an A100.
    gpu = recognised(smallest.name) or replace(GPUS["A100"], name=smallest.name)
    return Cluster(gpu, ranks, per_node=here, host_memory=memory.total_bytes() / here), float(smallest.total_memory)


def _loss_chunk_of(cfg: TrainConfig) -> int | None:
    """What the run in `run.dir` began with, which a resume keeps."""
    run_dir = Path(str(cfg.run.dir))
    if not (run_dir / snapshot.FILE).is_file():
        return None
    return snapshot.read_config(run_dir).model.loss_chunk


def _why(best: Choice, where: str, tried: list[Choice], kept: Collection[str]) -> list[str]:
    fitting = sum(one.fits for one in tried)
    lines = [
        f"auto: {where}; {len(tried)} settings looked at, {fitting} fit; taken is the fastest: "
        f"{' '.join(best.words())}",
        f"auto: predicted {best.needed / cost.GIB:.2f} GiB a rank, {best.terms.total:.3g} s a step"
        + (f"; kept as given: {', '.join(key for key in KEYS if key in kept)}" if kept else ""),
    ]
    faster = [one for one in tried if not one.fits and one.terms.total < best.terms.total]
    if faster:
        nearest = min(faster, key=lambda one: one.needed)
        lines.append(
            f"auto: the next faster one would need {nearest.needed / cost.GIB:.2f} GiB: "
            f"{' '.join(nearest.words()[:-1])} ({nearest.terms.total:.3g} s a step)"
        )
    return lines


def _nothing_fits(cfg: TrainConfig, where: str, tried: list[Choice], instead: list[str]) -> list[str]:
    least = min(tried, key=lambda one: one.needed)
    issues = [
        f"auto: no setting of {', '.join(KEYS)} makes tune.method={cfg.tune.method} fit on {where}; the least needs "
        f"{least.needed / cost.GIB:.1f} GiB ({' '.join(least.words()[:-1])})"
    ]
    if instead:
        issues += ["what would fit:", *(f"  {line}" for line in instead)]
    else:
        issues.append("use more or larger GPUs, a smaller model, or a smaller train.pack_tokens with data.max_len")
    return issues
