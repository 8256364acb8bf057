"""Run by the doctor in a process of its own: what this torch was built for, and what it sees here."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from sftdist.commands.doctor_checks.probe import FACTS
from sftdist.model.cpu import computes_bf16


def main() -> int:
    print(FACTS + json.dumps(facts()))
    return 0


def facts() -> dict[str, Any]:
    """JSON values only; memory in bytes."""
    nccl = dist.is_available() and dist.is_nccl_available() and torch.version.cuda is not None
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "architectures": torch.cuda.get_arch_list(),
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "cpu_bf16": computes_bf16(),
        "why_no_gpu": _why_no_gpu(),
    }


def _gpu(number: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(number)
    return {"name": found.name, "memory": found.total_memory, "capability": f"{found.major}.{found.minor}"}


def _why_no_gpu() -> str:
    if torch.version.cuda is None or torch.cuda.device_count() > 0:
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "CUDA starts, but gives no device"


if __name__ == "__main__":
    sys.exit(main())
