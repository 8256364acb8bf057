"""torch, the driver and the GPUs, and what joins them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftdist.commands.doctor_checks.finding import GIB, Finding, note, ok, problem
from sftdist.commands.doctor_checks.probe import Probe

SMI_SECONDS = 30.0
_CARD = ("name", "memory.total", "memory.used", "driver_version", "compute_cap")
_FULL_BF16 = 8.0  # compute capability from which bfloat16 and the flash kernels are there
_BUSY = 0.05  # of a GPU's memory
# What `nvidia-smi topo -m` calls the way between two GPUs, the slowest first.
_LINKS = {
    "SYS": "PCIe and the link between the processors",
    "NODE": "PCIe and two of its bridges within one processor",
    "PHB": "PCIe through the processor",
    "PXB": "several PCIe switches",
    "PIX": "one PCIe switch",
}
_BUILDS = "Install a torch that is built for CUDA: https://pytorch.org/get-started names the line."


@dataclass(frozen=True)
class Card:
    """As the driver sees it; memory in MiB."""

    name: str
    memory: float
    used: float
    capability: str


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says. `error`: why it says nothing; `cuda`: the newest CUDA that the driver serves; `topology`:
    the matrix of `nvidia-smi topo -m`."""

    cards: tuple[Card, ...] = ()
    version: str = ""
    cuda: str = ""
    topology: str = ""
    error: str = ""


@dataclass(frozen=True)
class Torch:
    """What torch says of itself. `error`: why it cannot be imported; `cuda` and `rocm`: what it was built for;
    `cpu_bf16`: whether this CPU has instructions for bf16."""

    version: str = ""
    cuda: str | None = None
    rocm: str | None = None
    cxx11_abi: bool = True
    gloo: bool = True
    nccl: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: tuple[Mapping[str, Any], ...] = ()
    cpu_bf16: bool = True
    why_no_gpu: str = ""
    error: str = ""

    @classmethod
    def of(cls, probe: Probe) -> Torch:
        if probe.error:
            return cls(error=probe.error)
        lists = {name: tuple(probe.facts[name]) for name in ("architectures", "gpus")}
        return cls(**{**probe.facts, **lists})


def look() -> Driver:
    if shutil.which("nvidia-smi") is None:
        return Driver(error="nvidia-smi is not here")
    query = _smi(f"--query-gpu={','.join(_CARD)}", "--format=csv,noheader,nounits")
    if isinstance(query, Driver):
        return query
    rows = [[cell.strip() for cell in line.split(",")] for line in query.splitlines() if line.strip()]
    cards = tuple(Card(row[0], _number(row[1]), _number(row[2]), row[4]) for row in rows if len(row) == len(_CARD))
    if not cards:
        return Driver(error="nvidia-smi finds no GPU")
    summary, topology = _smi(), _smi("topo", "-m") if len(cards) > 1 else ""
    cuda = re.search(r"CUDA Version: *([\d.]+)", summary) if isinstance(summary, str) else None
    return Driver(
        cards=cards,
        version=rows[0][3],
        cuda=cuda[1] if cuda else "",
        topology=topology if isinstance(topology, str) else "",
    )


def _smi(*options: str) -> str | Driver:
    try:
        done = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Driver(error=f"nvidia-smi gave no answer within {SMI_SECONDS:.0f} seconds")
    except OSError as error:
        return Driver(error=f"nvidia-smi cannot be run: {error.strerror}")
    if done.returncode:
        return Driver(error=f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split()) or done.returncode}")
    return done.stdout


def _number(text: str) -> float:
    """0 for what the driver does not tell, such as [N/A]."""
    return float(text) if re.fullmatch(r"[\d.]+", text) else 0.0


def findings(torch: Torch, driver: Driver, visible: str | None) -> Iterator[Finding]:
    """`visible`: CUDA_VISIBLE_DEVICES, or None."""
    if torch.error:
        repair = "Nothing runs without it. To install it again:\n    pip install --force-reinstall --no-cache-dir torch"
        yield problem("torch", f"import torch: {torch.error}", repair)
    else:
        yield _torch(torch, driver, visible)
    yield _gpus(torch, driver)
    if len(driver.cards) > 1:
        yield _links(driver.topology)


def _torch(torch: Torch, driver: Driver, visible: str | None) -> Finding:
    built = f"built for CUDA {torch.cuda}" if torch.cuda else f"built for ROCm {torch.rocm}" if torch.rocm else ""
    name = f"torch {torch.version}, {built or 'built without CUDA, for the CPU'}"
    if not torch.gloo:
        return problem("torch", f"{name}, and without gloo, which connects the processes", "Install another build.")
    if torch.gpus or not driver.cards:
        versions = "".join([f"; NCCL {torch.nccl}, which connects GPUs" if torch.nccl else "", _served(driver)])
        return ok("torch", f"{name}{versions}")
    seen = f"the driver sees {_count(driver.cards)}, torch none"
    if not built:
        return problem("torch", f"{name}: {seen}. Training would run on the CPU", _BUILDS)
    if visible is not None and not visible.strip(","):
        advice = "unset CUDA_VISIBLE_DEVICES, unless training is meant to run on the CPU."
        return problem("torch", f"{name}: {seen}, since CUDA_VISIBLE_DEVICES is empty", advice)
    if torch.cuda and driver.cuda and _major(torch.cuda) > _major(driver.cuda):
        return problem(
            "torch",
            f"{name}: {seen}. The driver, {driver.version}, is too old: it serves CUDA up to {driver.cuda}",
            f"Install a newer driver, or a torch built for CUDA {_major(driver.cuda)} "
            "(https://pytorch.org/get-started names the line).",
        )
    return problem("torch", f"{name}: {seen}. CUDA says: {torch.why_no_gpu or 'nothing'}", "Look at nvidia-smi.")


def _served(driver: Driver) -> str:
    return f"; driver {driver.version}, which serves CUDA up to {driver.cuda}" if driver.cuda else ""


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _count(cards: Sequence[Card]) -> str:
    return f"{len(cards)} GPU{'s' if len(cards) > 1 else ''}"


def _gpus(torch: Torch, driver: Driver) -> Finding:
    gpus = [(gpu["name"], gpu["memory"] / GIB, gpu["capability"]) for gpu in torch.gpus]
    if not gpus:
        gpus = [(card.name, card.memory / 1024, card.capability) for card in driver.cards]
    if not gpus:
        return _no_gpu(driver, torch)
    kinds = Counter(f"{name} ({memory:.0f} GiB, compute capability {cap})" for name, memory, cap in gpus)
    text = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if torch.gpus and len(torch.gpus) < len(driver.cards):
        text += f". The machine has {len(driver.cards)}; the others are hidden from this process"
    missing = sorted({cap for _, _, cap in gpus if not _has_kernels(cap, torch.architectures)})
    if missing:
        text += f". This torch has no code for compute capability {', '.join(missing)}"
        return problem("gpus", text, "Install a torch that still supports this GPU, or one that already does.")
    busy = [str(number) for number, card in enumerate(driver.cards) if card.used > _BUSY * card.memory]
    if busy:
        text += f". In use by other programs already: GPU {', '.join(busy)}"
        return note("gpus", text, "nvidia-smi names the programs. Choose others with CUDA_VISIBLE_DEVICES.")
    if any(float(cap) < _FULL_BF16 for _, _, cap in gpus):
        text += ". Before compute capability 8.0 there is no fast bfloat16, which is the default"
        return note("gpus", text, "Train with precision=fp16.")
    if len(kinds) > 1:
        return note("gpus", f"{text}. They are not alike", "All ranks go at the pace of the slowest.")
    return ok("gpus", text)


def _no_gpu(driver: Driver, torch: Torch) -> Finding:
    absent = driver.error in ("nvidia-smi is not here", "nvidia-smi finds no GPU")
    text = (
        f"none ({driver.error}). Training runs on the CPU: right for trying out, for tests and for models of some "
        "million parameters, far too slow for billions"
    )
    if absent and not torch.cpu_bf16:
        return note(
            "gpus",
            f"{text}. This CPU has no instructions for bf16, which is the default",
            "Train with precision=fp32: here it is several times as fast.",
        )
    if absent:
        return note("gpus", text)
    return problem("gpus", f"{driver.error}. The driver or a GPU is not in order", "Ask whoever runs this machine.")


def _has_kernels(capability: str, architectures: Sequence[str]) -> bool:
    """Whether a build has code for a GPU: of the same major version and no later minor one, or some to translate."""
    if not architectures:
        return True
    major, minor = (int(part) for part in capability.split("."))
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        kind, built = match[1], (int(match[2]), int(match[3]))
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (
            kind == "compute" and built <= (major, minor)
        ):
            return True
    return False


def _links(topology: str) -> Finding:
    """From the rows `GPU0 X NV18 NV18 ...`."""
    rows = [line.split() for line in re.sub(r"\x1b\[\d*m", "", topology).splitlines() if re.match(r"GPU\d+\s", line)]
    pairs = Counter(cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X")
    if not pairs:
        return note("links", "nvidia-smi does not say what joins the GPUs")
    slow = [name for name in _LINKS if pairs[name]]
    fast = sorted(name for name in pairs if name.startswith("NV"))
    if not slow:
        return ok("links", f"NVLink between all pairs of GPUs ({', '.join(fast)}: the number of links of a pair)")
    ways = "; ".join(f"{_LINKS[name]} ({name})" for name in slow)
    if fast:
        return ok("links", f"NVLink between some pairs of GPUs ({', '.join(fast)}), between others {ways}")
    advice = "ZeRO 3 sends the weights over it in every step. Where memory allows: zero.stage=2, or LoRA."
    return note("links", f"no NVLink; the GPUs exchange data over {ways}", advice)
