"""Whether the training program itself can be loaded, and what would have to be compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftdist.commands.doctor_checks.finding import Finding, note, ok, problem
from sftdist.commands.doctor_checks.gpus import Torch
from sftdist.commands.doctor_checks.probe import Probe

MODULE = "sftdist.train"
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 30.0
_NO_OP = (
    "Training needs no compiler: it gives DeepSpeed torch's own optimizers, with zero.offload, too, so none of "
    "DeepSpeed's C++ and CUDA parts is needed"
)


@dataclass(frozen=True)
class Compilers:
    """Paths, None where there is none. `nvcc_version`: such as 13.0; `cuda_home`: CUDA_HOME, and whether it exists."""

    cxx: str | None = None
    ninja: str | None = None
    nvcc: str | None = None
    nvcc_version: str = ""
    cuda_home: str | None = None
    cuda_home_exists: bool = False


def look() -> Compilers:
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home, "bin")] if home else []
    nvcc = next(filter(None, (shutil.which("nvcc", path=str(path)) for path in folders)), shutil.which("nvcc"))
    return Compilers(
        cxx=next(filter(None, map(shutil.which, _COMPILERS)), None),
        ninja=shutil.which("ninja"),
        nvcc=nvcc,
        nvcc_version=_release(nvcc) if nvcc else "",
        cuda_home=home,
        cuda_home_exists=home is not None and Path(home).is_dir(),
    )


def _release(nvcc: str) -> str:
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else ""


def findings(loaded: Probe, torch: Torch, compilers: Compilers) -> Iterator[Finding]:
    if loaded.error:
        advice = "" if torch.error else "The package that it names is broken or missing: install it again."
        yield problem("program", f"import {MODULE}: {loaded.error}", advice or "Mend torch first.")
    else:
        yield ok("program", f"{MODULE} and all that it imports, DeepSpeed among it, can be loaded")
    yield _compiler(compilers, torch)


def _compiler(found: Compilers, torch: Torch) -> Finding:
    if found.cuda_home is not None and not found.cuda_home_exists:
        text = f"CUDA_HOME={found.cuda_home}, which is not there. {_NO_OP}"
        return note("compiler", text, "unset CUDA_HOME, or correct it, before something is to be built for CUDA.")
    parts = {"a C++ compiler": found.cxx, "ninja": found.ninja}
    if torch.cuda:
        parts["nvcc"] = found.nvcc
    missing = [name for name, path in parts.items() if path is None]
    if missing:
        needed = (
            "fused kernels, model.compile, and flash-attn where it is built"
            if torch.cuda
            else "extensions of torch, which nothing here uses"
        )
        text = f"not on PATH: {', '.join(missing)}. {_NO_OP}. What would need a compiler: {needed}"
        return note("compiler", text) if torch.cuda else ok("compiler", text)
    there = [path for path in (found.cxx, found.ninja) if path]
    if found.nvcc:
        there.append(f"{found.nvcc} of CUDA {found.nvcc_version or '?'}")
    text = f"{', '.join(there)}. {_NO_OP}"
    if torch.cuda and found.nvcc_version and found.nvcc_version.split(".")[0] != torch.cuda.split(".")[0]:
        text = f"{', '.join(there)}, but torch is built for CUDA {torch.cuda}. {_NO_OP}"
        return note("compiler", text, f"To build flash-attn here, point CUDA_HOME to CUDA {torch.cuda}.")
    return ok("compiler", text)
