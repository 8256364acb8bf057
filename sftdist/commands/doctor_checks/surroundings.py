"""What the environment says: variables that change how training runs, SLURM, and the hub's offline switches."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sftdist.commands.doctor_checks.finding import Finding, note, ok, problem

# variable: what it does; those that only slow training down, or that are left over, are said with a note
_MEANINGS = {
    "CUDA_VISIBLE_DEVICES": "the GPUs that programs may see",
    "OMP_NUM_THREADS": "CPU threads of each process; without it sftdist train shares the cores out",
    "NCCL_SOCKET_IFNAME": "the interface of NCCL",
    "GLOO_SOCKET_IFNAME": "the interface of gloo",
    "NCCL_DEBUG": "how much NCCL tells",
    "DS_ACCELERATOR": "the device that DeepSpeed looks for; sftdist sets it where there is no GPU",
    "PYTORCH_CUDA_ALLOC_CONF": "how torch takes GPU memory",
    "PYTORCH_ALLOC_CONF": "how torch takes GPU memory",
    "PYTHONPATH": "modules there come before those that are installed",
    "LD_LIBRARY_PATH": "libraries there come before those of torch, such as CUDA's and NCCL's",
}
_SLOW = {
    "NCCL_P2P_DISABLE": "GPUs exchange data through the host's memory",
    "NCCL_IB_DISABLE": "NCCL leaves InfiniBand unused",
    "NCCL_SHM_DISABLE": "NCCL leaves shared memory unused",
    "CUDA_LAUNCH_BLOCKING": "the program waits for each GPU operation",
}
_SHOWN = re.compile(r"(NCCL|GLOO|TORCH_NCCL|TORCH_DISTRIBUTED|DS)_[A-Z0-9_]+")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = {
    "SLURM_JOB_ID": "job {}",
    "SLURM_JOB_PARTITION": "partition {}",
    "SLURM_JOB_NUM_NODES": "nodes: {}",
    "SLURM_JOB_NODELIST": "names: {}",
    "SLURM_NODEID": "this is number {}",
    "SLURM_NTASKS": "tasks: {}",
    "SLURM_NTASKS_PER_NODE": "tasks per node: {}",
    "SLURM_CPUS_ON_NODE": "cores here: {}",
    "SLURM_GPUS_ON_NODE": "GPUs here: {}",
}
_TASKS = (
    "This job has several tasks per node, but sftdist wants one: sftdist train starts the processes of a node's GPUs "
    "itself. Submit with --ntasks-per-node=1 (and --cpus-per-task for the cores), or start it once on each node:\n"
    "    srun --ntasks-per-node=1 --ntasks=$SLURM_JOB_NUM_NODES ..."
)
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True)
class Surroundings:
    """`variables`: those that matter here, with their values and without any secret; `has_token`: HF_TOKEN is set;
    `sbatch`: its path; `offline`: whether the hub's library goes without network, None where it could not be asked."""

    variables: Mapping[str, str]
    has_token: bool = False
    sbatch: str | None = None
    offline: bool | None = None


def look(offline: bool | None) -> Surroundings:
    wanted = {*_MEANINGS, *_SLOW, *_RANKS, *_SLURM, *_OFFLINE}
    found = {name: value for name, value in os.environ.items() if name in wanted or _SHOWN.fullmatch(name)}
    return Surroundings(dict(sorted(found.items())), "HF_TOKEN" in os.environ, shutil.which("sbatch"), offline)


def findings(found: Surroundings) -> Iterator[Finding]:
    yield _variables(found.variables)
    yield _slurm(found)
    yield _hub(found)


def _variables(variables: Mapping[str, str]) -> Finding:
    if "RANK" in variables:
        left = " ".join(name for name in _RANKS if name in variables)
        text = f"RANK={variables['RANK']} is set: sftdist train takes itself for a process that torchrun has started"
        return problem("variables", text, f"    unset {left}")
    slow = {name: text for name, text in _SLOW.items() if variables.get(name, "0") not in ("", "0")}
    names = [name for name in variables if name in _MEANINGS or (_SHOWN.fullmatch(name) and name not in slow)]
    text = "; ".join(f"{name}={variables[name]}{_meaning(name)}" for name in names)
    if slow:
        slows = "; ".join(f"{name}={variables[name]}: {meaning}" for name, meaning in slow.items())
        return note(
            "variables",
            "; ".join(filter(None, (slows, text))),
            f"Training is slower with it. Where nobody needs it:\n    unset {' '.join(slow)}",
        )
    return ok("variables", text or "none is set that changes how training runs")


def _meaning(name: str) -> str:
    return f" ({_MEANINGS[name]})" if name in _MEANINGS else ""


def _slurm(found: Surroundings) -> Finding:
    if "SLURM_JOB_ID" in found.variables:
        parts = [text.format(found.variables[name]) for name, text in _SLURM.items() if name in found.variables]
        text = f"{', '.join(parts)}. A run without a name is named after the job"
        return note("slurm", text, _TASKS) if _several_tasks(found.variables) else ok("slurm", text)
    if found.sbatch:
        return ok("slurm", f"{found.sbatch} is here: jobs start with sbatch slurm/train.sbatch +exp=...")
    return ok("slurm", "not here, and not needed: it is the job scheduler of clusters")


def _several_tasks(variables: Mapping[str, str]) -> bool:
    """Whether srun would start more than one task on a node."""
    nodes, tasks, on_each = (
        int(value) if (value := variables.get(name, "1")).isdecimal() else 1
        for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    )
    return tasks > nodes or on_each > 1


def _hub(found: Surroundings) -> Finding:
    token = "HF_TOKEN is set" if found.has_token else "HF_TOKEN is not set, which only private and gated models need"
    switches = ", ".join(f"{name}={found.variables[name]}" for name in _OFFLINE if name in found.variables)
    if found.offline:
        text = f"offline ({switches}): models and data given by name come from the cache, or not at all"
        return ok("hub", text)
    return ok("hub", f"models and data given by name are downloaded when first used (not tried here). {token}")
