"""What GPUs can do, by the vendors' data sheets: the rates that predictions and utilisations are made of.

Nothing here is measured: how much of a peak a training step reaches is `timing.ACHIEVED`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches

from sftdist.core.errors import ConfigError

NDR_GBPS = 400.0  # InfiniBand NDR, one adapter a GPU


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one CPU rank. Rates in units per second; links each way, per GPU.

    `flops`: dense matrix products in bf16 (fp16 where there is no bf16). `memory_gib`: what the device reports, about.
    `memory_rate`: bytes of its own memory. `link_rate`: bytes to the other GPUs of a node. `host_rate`: bytes to the
    host's memory, where offloaded states lie.
    """

    name: str
    flops: float
    memory_gib: float
    memory_rate: float
    link_rate: float
    host_rate: float
    overlaps: bool = True  # communication runs beside compute


_PCIE3, _PCIE4, _PCIE5, _C2C = 16e9, 32e9, 64e9, 450e9

# Names as the driver gives them. Where one name contains another, the longer comes first: the first match counts.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("GB200", 2.5e15, 184, 8.0e12, 900e9, _C2C),
        Gpu("B200", 2.25e15, 178, 7.7e12, 900e9, _PCIE5),
        Gpu("GH200", 989e12, 94, 4.0e12, 450e9, _C2C),
        Gpu("H200", 989e12, 139, 4.8e12, 450e9, _PCIE5),
        Gpu("H100 PCIe", 756e12, 79, 2.0e12, _PCIE5, _PCIE5),
        Gpu("H100 NVL", 835e12, 93, 3.9e12, 300e9, _PCIE5),
        Gpu("H100", 989e12, 79, 3.35e12, 450e9, _PCIE5),
        Gpu("A100", 312e12, 79, 2.04e12, 300e9, _PCIE4),
        Gpu("L40S", 362e12, 44, 864e9, _PCIE4, _PCIE4),
        Gpu("L4", 121e12, 22, 300e9, _PCIE4, _PCIE4),
        Gpu("A10G", 70e12, 22, 600e9, _PCIE4, _PCIE4),
        Gpu("A10", 125e12, 22, 600e9, _PCIE4, _PCIE4),
        Gpu("A40", 150e12, 44, 696e9, _PCIE4, _PCIE4),
        Gpu("RTX A6000", 155e12, 47, 768e9, _PCIE4, _PCIE4),
        Gpu("RTX 6000 Ada", 364e12, 47, 960e9, _PCIE4, _PCIE4),
        Gpu("RTX 4090", 165e12, 23.5, 1008e9, _PCIE4, _PCIE4),
        Gpu("V100", 125e12, 31, 900e9, 150e9, _PCIE3),
        Gpu("MI300X", 1307e12, 191, 5.3e12, 448e9, _PCIE5),
    )
}
# A rank on a CPU, roughly: good for the order of settings, not for their seconds.
CPU = Gpu("CPU", 0.2e12, 16, 10e9, 1e9, 10e9, overlaps=False)


@dataclass(frozen=True, slots=True)
class Cluster:
    """So many GPUs of one kind, `per_node` to a host; `network_rate`: bytes per second each way and GPU between hosts.

    `host_memory_rate`: bytes per second of a host's memory, shared by its GPUs; it bounds an offloaded optimizer.
    `host_memory`: bytes of it for each GPU, where they are known.
    """

    gpu: Gpu
    gpus: int
    per_node: int = 8
    network_rate: float = NDR_GBPS * 1e9 / 8
    host_memory_rate: float = 200e9
    host_memory: float = math.inf

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def named(name: str) -> Gpu:
    """The GPU of a name as one types it: `h100`, `H100-PCIe`, `rtx_4090`. Raises ConfigError with all names."""
    typed = {_typed(known): gpu for known, gpu in GPUS.items()}
    if (found := typed.get(_typed(name))) is not None:
        return found
    close = get_close_matches(_typed(name), typed, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"cluster.gpu: given {name!r}, required one of {', '.join(typed)}{meant}")


def recognised(device_name: str) -> Gpu | None:
    """The GPU of a name as the driver gives it, `NVIDIA H100 80GB HBM3`; None for one that is not in the table."""
    return next((gpu for part, gpu in GPUS.items() if re.search(rf"\b{part}\b", device_name)), None)


def _typed(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())
