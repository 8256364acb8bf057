"""What a checkpoint of 8B and 70B would cost on 8 to 64 GPUs: arithmetic on stated speeds, nothing is run.

How the engine reads its state, in DeepSpeed 0.19 (`safe_get_full_fp32_param` and `safe_get_full_optimizer_state`, three
times a parameter with AdamW): at ZeRO 1-2 every rank makes a zeroed float32 buffer of the whole tensor, copies its own
fragment into it and all-reduces the buffer (`utils/tensor_fragment.py`, `get_full_hp_param`); at ZeRO 3 the parts are
all-gathered (`runtime/zero/stage3.py`, `_fp32_state_allgather`). So the whole checkpoint passes every rank: twice at
ZeRO 1-2, once at ZeRO 3. Each rank then copies to its host what it writes, its share of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sftdist.model import cost

GB = 1e9
PER_PARAMETER = 12  # bytes: value and two moments of AdamW in float32


@dataclass(frozen=True)
class Cluster:
    """Speeds in GB/s. `link`: what a collective over hosts gets through the network cards of one host, all together;
    `disk`: of the shared file system for all hosts together, `host_disk`: at most of one host."""

    name: str
    link: float
    disk: float
    host_disk: float
    gpus: int = 8  # a host
    nvlink: float = 300.0  # bus bandwidth of a collective inside a host
    copy: float = 6.0  # device to pageable host memory, one GPU
    hash: float = 1.5  # sha256 on one core
    call: float = 100e-6  # seconds of one collective of a small tensor


CLUSTERS = [
    Cluster("InfiniBand 8 x 400 Gb/s a host, parallel file system", link=320.0, disk=40.0, host_disk=10.0),
    Cluster("Ethernet 100 Gb/s a host, NFS", link=10.0, disk=2.0, host_disk=2.0),
]
STAGES = (2, 3)
GPUS = (8, 16, 32, 64)
GPU_MEMORY = 80.0  # GB
_CHOICES: dict[str, Any] = {"pack_tokens": 8192, "checkpointing": True}

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


@dataclass(frozen=True)
class Save:
    """Bytes in GB and times in seconds of one save. `traffic`: what a rank receives while all state is gathered;
    `gather_memory`: of a GPU for the largest tensor, value and moments; `host_memory`: of a host for the copies from
    which a background save is written. `lift`: from host memory to the device, where the optimizer is offloaded."""

    total: float
    per_rank: float
    traffic: float
    gather_memory: float
    host_memory: float
    lift: float
    gather: float
    copy: float
    write: float
    hash: float

    @property
    def stall(self) -> float:
        """What training waits for when a thread writes."""
        return self.lift + self.gather + self.copy

    @property
    def whole(self) -> float:
        """What it waits for when nothing is done in the background; hashing reads what was just written."""
        return self.stall + self.write + self.hash


def save_cost(config: Mapping[str, Any], setup: cost.Setup, cluster: Cluster) -> Save:
    """One save of a full fine-tune with AdamW at ZeRO 1-3."""
    count, gpus = cost.parameters(config), setup.world
    total = PER_PARAMETER * count.total / GB
    hosts, local = -(-gpus // cluster.gpus), min(gpus, cluster.gpus)
    passes = (1 if setup.stage == 3 else 2) * (gpus - 1) / gpus
    speed = cluster.nvlink if hosts == 1 else min(cluster.nvlink, cluster.link)
    tensors = 9 * config["num_hidden_layers"] + 3
    share = total / gpus
    return Save(
        total=total,
        per_rank=share,
        traffic=passes * total,
        gather_memory=PER_PARAMETER * count.embedding / GB,
        host_memory=share * local,
        lift=share / cluster.copy if setup.offload else 0.0,
        gather=passes * total / speed + 3 * tensors * cluster.call,
        copy=share / cluster.copy,
        write=max(total / cluster.disk, total / hosts / cluster.host_disk),
        hash=share / cluster.hash,
    )


def setups(config: Mapping[str, Any]) -> Iterator[cost.Setup]:
    """Every number of GPUs and stage that fits; where only an offloaded optimizer fits, with that."""
    for gpus in GPUS:
        fitting = [setup for stage in STAGES if fits(config, setup := cost.Setup(stage, gpus, **_CHOICES))]
        offloaded = cost.Setup(3, gpus, offload=True, **_CHOICES)
        yield from fitting or ([offloaded] if fits(config, offloaded) else [])


def fits(config: Mapping[str, Any], setup: cost.Setup) -> bool:
    """Whether weights (bf16), gradients, optimizer state and activations leave room on a GPU."""
    return cost.total(cost.memory(config, setup)) / GB < GPU_MEMORY


def plan_table() -> list[dict[str, Any]]:
    """Every model, number of GPUs and stage that fits, on every cluster."""
    return [
        _row(cluster, name, setup, save_cost(config, setup, cluster))
        for cluster in CLUSTERS
        for name, config in MODELS.items()
        for setup in setups(config)
    ]


def _row(cluster: Cluster, model: str, setup: cost.Setup, save: Save) -> dict[str, Any]:
    return {
        "cluster": cluster.name.split()[0],
        "model": model,
        "gpus": setup.world,
        "zero": f"{setup.stage}{', offloaded' if setup.offload else ''}",
        "checkpoint_gb": save.total,
        "gb_a_rank": save.per_rank,
        "traffic_gb_a_rank": save.traffic,
        "gather_s": save.lift + save.gather,
        "copy_s": save.copy,
        "write_s": save.write,
        "hash_s": save.hash,
        "stall_s": save.whole,
        "stall_background_s": save.stall,
        "stall_fragments_s": save.copy,
        "copies_gb_a_host": save.host_memory,
        "gather_gb_a_gpu": save.gather_memory,
    }


def needs_fragments(row: Mapping[str, Any], worth: float = 10.0) -> bool:
    """Gathering costs more than it is worth where training would wait `worth` seconds less without it."""
    return bool(row["stall_background_s"] - row["stall_fragments_s"] > worth)


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """Models and numbers of GPUs without a row."""
    there = {(row["model"], row["gpus"]) for row in rows}
    return [f"{name} on {gpus} GPUs" for name in MODELS for gpus in GPUS if (name, gpus) not in there]


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """The assumed speeds, and where ranks should write their own fragments."""
    speeds = [
        f"{one.name}: {one.link:g} GB/s a host between hosts, {one.nvlink:g} inside one, file system {one.disk:g} GB/s "
        f"for all and {one.host_disk:g} for one host, copy to host memory {one.copy:g} GB/s a GPU, sha256 {one.hash:g} "
        f"GB/s a rank, {one.call * 1e6:g} us a call"
        for one in CLUSTERS
    ]
    named = [
        f"{row['model']} on {row['gpus']} GPUs at ZeRO {row['zero']} ({row['cluster']}): "
        f"{row['stall_background_s']:.0f} s instead of {row['stall_fragments_s']:.0f} s"
        for row in rows
        if needs_fragments(row)
    ]
    return [
        f"On paper, for GPUs of {GPU_MEMORY:g} GB, AdamW in float32, {PER_PARAMETER} bytes a parameter. "
        f"{'. '.join(speeds)}.",
        "A rank receives the whole checkpoint while it is gathered: 2 (N-1)/N of it at ZeRO 1-2, where DeepSpeed "
        "all-reduces zeroed buffers of whole tensors, (N-1)/N at ZeRO 3, where it gathers the parts. A tensor's value "
        "and moments are there at the same time, so the largest one (the embeddings) bounds the memory.",
        f"What does not fit, even with the optimizer offloaded, is not in the table: {', '.join(missing(rows))}.",
        "Where training waits more than 10 s longer for the gathering than it would if ranks wrote their own fragments "
        "(`safe_get_local_*` at ZeRO 3, the fragments of `_hp_mapping` at ZeRO 1-2): "
        f"{'; '.join(named) or 'nowhere'}.",
    ]
