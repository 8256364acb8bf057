"""Machines as the doctor would see them, with every fact fixed. `python -m tests.unit.commands.doctor_machines` writes
what the doctor says of each to golden/: read it before it is committed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sftdist.commands.doctor import Facts, findings
from sftdist.commands.doctor_checks.attention import Attention, Flash
from sftdist.commands.doctor_checks.finding import GIB, render
from sftdist.commands.doctor_checks.folders import Folder, Folders
from sftdist.commands.doctor_checks.gpus import Card, Driver, Torch
from sftdist.commands.doctor_checks.host import Host
from sftdist.commands.doctor_checks.network import Collective, Network
from sftdist.commands.doctor_checks.probe import Probe
from sftdist.commands.doctor_checks.program import Compilers
from sftdist.commands.doctor_checks.surroundings import Surroundings
from sftdist.commands.doctor_checks.versions import Versions

GOLDEN = Path(__file__).parent / "golden"
NO_VARLEN = (
    "torch_varlen does not run on cpu: Could not run 'aten::_flash_attention_forward' with arguments from the 'CPU' "
    "backend"
)
UNDEFINED = (
    "ImportError: /env/flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so: undefined symbol: "
    "_ZN3c105ErrorC2ENS_14SourceLocationESs"
)
_BOUNDS = {"deepspeed": "<0.20,>=0.19.8", "peft": "<0.22,>=0.20", "torch": ">=2.11", "transformers": "<6,>=5.20"}
_PACKAGES = {"deepspeed": "0.19.8", "peft": "0.21.2", "torch": "2.13.0", "transformers": "5.23.0"}
_TOPOLOGY_ROW = "GPU{0}\t{1}\tPIX\tNODE\t0-51\t0\tN/A"


def _folder(path: str, free: float, total: float, error: str = "") -> Folder:
    return Folder(path, path, int(free * GIB), int(total * GIB), error)


def no_gpu() -> Facts:
    """A laptop."""
    return Facts(
        versions=Versions("3.12.4", ">=3.11", _BOUNDS, _PACKAGES, ("torch", "deepspeed", "transformers", "peft")),
        torch=Torch(version="2.13.0+cpu"),
        driver=Driver(error="nvidia-smi is not here"),
        visible=None,
        attention=Attention("sdpa", ("flash_attn is not installed", NO_VARLEN)),
        flash=Flash(python="cp312", platform="linux_x86_64"),
        loaded=Probe(),
        compilers=Compilers(cxx="/usr/bin/c++", ninja="/usr/bin/ninja"),
        network=Network("laptop", ("127.0.1.1",), {"lo": ("127.0.0.1", "::1"), "wlan0": ("192.168.1.7",)}),
        collective=Collective({"gloo": 0.0041}),
        folders=Folders(
            runs=Folder("/srv/team/runs", "/srv/team", 210 * GIB, 476 * GIB),
            stores=Folder("/srv/team/stores", "/srv/team", 210 * GIB, 476 * GIB),
            shared_memory=_folder("/dev/shm", 7.7, 7.7),
            hub_cache=_folder("/srv/team/.cache/huggingface/hub", 210, 476),
        ),
        host=Host(8, 8, int(15.4 * GIB), int(9.2 * GIB), None, 1024, 2**23, True),
        surroundings=Surroundings({}, offline=False),
    )


def flash_attn_broken() -> Facts:
    """A GPU server whose torch was renewed, and whose flash-attn was not."""
    gpu: dict[str, Any] = {"name": "NVIDIA A100-SXM4-80GB", "memory": int(79.3 * GIB), "capability": "8.0"}
    base = no_gpu()
    return replace(
        base,
        torch=Torch(
            version="2.13.0+cu130",
            cuda="13.0",
            nccl="2.29.3",
            architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
            gpus=(gpu,),
        ),
        driver=Driver((Card(gpu["name"], 81920, 1, "8.0"),), "580.65.06", "13.0"),
        attention=Attention(
            "torch_varlen",
            (f"flash_attn cannot be imported: {UNDEFINED}",),
            kernels=("torch", "triton"),
            kernels_rejected=("liger_kernel is not installed",),
        ),
        flash=replace(base.flash, version="2.8.3", error=UNDEFINED),
        compilers=replace(base.compilers, nvcc="/usr/local/cuda/bin/nvcc", nvcc_version="13.0"),
    )


def full_disk() -> Facts:
    """The folder of the runs is on a disk of its own, which is full; the stores' may not be written to."""
    base = no_gpu()
    runs = _folder("/scratch/me/runs", 0, 931.5, "No space left on device")
    stores = _folder("/data/stores", 3200, 7451, "Permission denied")
    return replace(base, folders=replace(base.folders, runs=runs, stores=stores))


def no_compiler() -> Facts:
    """A slim container with a GPU; CUDA's compiler is absent, too."""
    base, reason = flash_attn_broken(), "the fused loss does not run on cuda: Failed to find C compiler."
    slower = replace(
        base.attention, kernels=("torch", "torch"), kernels_rejected=("liger_kernel is not installed", reason)
    )
    return replace(base, attention=slower, flash=no_gpu().flash, compilers=Compilers())


def eight_h100() -> Facts:
    """A node of a cluster, within a job. Written by hand after NVIDIA's documents: not seen on such a machine."""
    gpu: dict[str, Any] = {"name": "NVIDIA H100 80GB HBM3", "memory": int(79.2 * GIB), "capability": "9.0"}
    base = flash_attn_broken()
    job: dict[str, Any] = {
        "SLURM_JOB_ID": "81243",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu[017-018]",
        "SLURM_NODEID": "0",
        "NCCL_DEBUG": "WARN",
    }
    return replace(
        base,
        torch=replace(base.torch, gpus=(gpu,) * 8),
        driver=Driver((Card(gpu["name"], 81559, 4, "9.0"),) * 8, "580.95.05", "13.0", topology(8)),
        attention=Attention("flash_attn", kernels=("liger", "triton"), no_qlora=""),
        flash=replace(base.flash, error=""),
        network=Network(
            "gpu017",
            ("10.40.0.17",),
            {"lo": ("127.0.0.1",), "bond0": ("10.40.0.17",), "ib0": ("10.41.0.17",)},
            tuple(f"mlx5_{number}" for number in range(8)),
        ),
        collective=Collective({"gloo": 0.0052, "nccl": 0.0009}),
        folders=Folders(
            _folder("/lustre/me/runs", 91_000, 512_000),
            _folder("/lustre/me/stores", 91_000, 512_000),
            _folder("/dev/shm", 1007, 1008),
            _folder("/lustre/me/hub", 91_000, 512_000),
        ),
        host=Host(208, 192, 2015 * GIB, 1480 * GIB, 1500 * GIB, 131072, -1, True),
        surroundings=Surroundings(job, has_token=True, sbatch="/usr/bin/sbatch", offline=False),
    )


def topology(gpus: int, between: str = "NV18") -> str:
    """What `nvidia-smi topo -m` prints, the underlined header included."""
    names = [f"GPU{number}" for number in range(gpus)]
    header = "\t" + "\t".join([*names, "NIC0", "CPU Affinity", "NUMA Affinity"])
    rows = [
        _TOPOLOGY_ROW.format(row, "\t".join(" X " if row == column else between for column in range(gpus)))
        for row in range(gpus)
    ]
    nic = "NIC0\t" + "\t".join(["PIX"] * gpus) + "\t X "
    return "\n".join([f"\x1b[4m{header}\x1b[0m", *rows, nic, "", "Legend:", "", "  X    = Self", ""])


MACHINES = {machine.__name__: machine for machine in (no_gpu, flash_attn_broken, full_disk, no_compiler, eight_h100)}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, machine in MACHINES.items():
        (GOLDEN / f"{name}.txt").write_text(render(findings(machine())), encoding="utf-8")
