"""The GPUs to choose settings for: those that are named, else those of this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sftdist.core.errors import ConfigError
from sftdist.core.settings import TrainConfig
from sftdist.model import cost
from sftdist.model.cpu import computes_bf16
from sftdist.model.hardware import CPU, Cluster, named, recognised
from sftdist.training.auto import this_machine

A_NODE = 8  # GPUs of a node, where nobody says
DEFAULT = "h100"
WITHOUT_BF16 = ("V100",)  # of the table


@dataclass(frozen=True)
class Machine:
    """`budget`: bytes of one GPU, or of one rank on a CPU; `plan_words`: what tells `sftdist plan` the same."""

    cluster: Cluster
    budget: float
    plan_words: str

    @property
    def on_cpu(self) -> bool:
        return self.cluster.gpu is CPU

    @property
    def precision(self) -> str:
        if self.on_cpu:
            return "bf16" if computes_bf16() else "fp32"
        return "fp16" if self.cluster.gpu.name in WITHOUT_BF16 else "bf16"

    @property
    def gib(self) -> float:
        return self.budget / cost.GIB

    def __str__(self) -> str:
        rank = "CPU rank" if self.on_cpu else self.cluster.gpu.name
        return f"{self.cluster.gpus} x {rank} with {self.gib:.1f} GiB each"


def machine_of(gpus: int | None, gpu: str | None, memory_gib: float | None) -> Machine:
    """What was named; with nothing named, this machine, its CPU where it has no GPU. Raises ConfigError for a GPU that
    is not in the table of `sftdist plan`."""
    if gpus is None and gpu is None and memory_gib is None:
        cluster, budget = this_machine(TrainConfig())
        if cluster.gpu is CPU:
            return Machine(cluster, budget, "")
        return _machine(cluster, cluster.gpus, budget / cost.GIB)
    try:
        card = named(gpu or _here() or DEFAULT)
    except ConfigError as error:
        raise ConfigError([issue.replace("cluster.gpu", "--gpu") for issue in error.issues]) from error
    count = gpus or 1
    return _machine(Cluster(card, count, per_node=min(A_NODE, count)), count, memory_gib or card.memory_gib)


def _machine(cluster: Cluster, gpus: int, gib: float) -> Machine:
    kind = cluster.gpu.name.lower().replace(" ", "-")
    words = f"cluster.gpus={gpus} cluster.gpu={kind} cluster.memory_gib={gib:.4g}"
    return Machine(replace(cluster, gpu=replace(cluster.gpu, memory_gib=gib)), gib * cost.GIB, words)


def _here() -> str | None:
    """The GPU of this machine, where it has one that the table knows."""
    if not torch.cuda.is_available():
        return None
    found = recognised(torch.cuda.get_device_name(0))
    return None if found is None else found.name
