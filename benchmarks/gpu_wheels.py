"""Packages that a machine without a network lacks: which wheels to make elsewhere, and how they are put on the path."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

PLATFORMS = ("2_28", "2_27", "2_24", "2_17")  # pip matches each tag exactly
MOST = 64 * 2**20  # bytes that travel to the machine, the repository among them
# By importance: whoever has room for less leaves out from the end. What is pinned was tried with this code.
DOWNLOADED = (
    "hjson==3.1.0",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "annotated-types",
    "typing-inspection",
    "msgpack",
    "peft==0.21.2",
    "liger-kernel==0.8.5",
    "transformers==5.23.0",
    "bitsandbytes==0.50.2",
    "trl==1.16.0",
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
)
BUILT = "deepspeed==0.19.8"  # its wheel is made from source, and then pure Python
# What each part of the benchmark goes without where the package is absent.
PARTS = {
    "deepspeed": "ZeRO 1-3 and offload (ZeRO 0 needs none of it)",
    "liger_kernel": "Liger's kernels, in the layers and beside our loss",
    "bitsandbytes": "QLoRA",
    "flash_attn": "the flash_attn backend",
    "trl": "the column of TRL",
    "datasets": "the column of TRL",
}


def command_lines(folder: str = "DIR") -> list[str]:
    """The commands that fill the folder, on a machine with a network and this project installed."""
    platforms = " ".join(f"--platform manylinux_{tag}_x86_64" for tag in PLATFORMS)
    common = f"--no-deps --only-binary=:all: --python-version 3.12 --implementation cp {platforms}"
    return [
        f"python -m pip wheel --no-deps --no-build-isolation -w {folder} {BUILT}",
        f"python -m pip download {common} -d {folder} {' '.join(DOWNLOADED)}",
        f"python -m benchmarks.gpu --slim {folder}  # bitsandbytes for CUDA 13 alone: 4 MB instead of 43",
    ]


def install(folder: Path, target: Path) -> str:
    """Unpack the wheels of a folder into `target`, and put that first on this process's and its children's path.

    Returns '' or why it failed: without the wheels the benchmark still says what it can.
    """
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        return f"{folder} holds no wheel"
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*words, "--target", str(target), *wheels], capture_output=True, text=True)
    if done.returncode != 0:
        return f"pip install: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    sys.path.insert(0, str(target))
    invalidate_caches()
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *([earlier] if earlier else [])])
    return ""


def absent() -> dict[str, str]:
    """The optional packages that are not there, each with what goes without."""
    return {name: without for name, without in PARTS.items() if find_spec(name) is None}


def slim(wheel: Path, keep: tuple[str, ...] = ("cpu", "cuda130")) -> None:
    """Rewrite a bitsandbytes wheel without the libraries of other devices; its RECORD is made anew."""
    rows: list[str] = []
    made = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        record = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        for name in old.namelist():
            is_library = Path(name).name.startswith("libbitsandbytes_") and name.endswith(".so")
            if name == record or (is_library and Path(name).stem.removeprefix("libbitsandbytes_") not in keep):
                continue
            content = old.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(content)}")
            new.writestr(name, content)
        new.writestr(record, "\n".join([*rows, f"{record},,", ""]))
    made.replace(wheel)
