"""Which attention and kernels training would choose, whether QLoRA runs, and what is the matter with flash-attn."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util

from sftdist.commands.doctor_checks.finding import Finding, note, ok, problem
from sftdist.commands.doctor_checks.gpus import Torch
from sftdist.commands.doctor_checks.probe import Probe

PACKAGE = "flash_attn"
_NEWEST = "2.8.3"  # suggested where none is installed
_RELEASES = "https://github.com/Dao-AILab/flash-attention/releases"
_MEANINGS = (
    ("undefined symbol", "It was built for another torch than the one that is installed."),
    ("cannot open shared object file", "It was built for another CUDA than that of the installed torch."),
    (r"GLIBC\S* not found", "It was built on a newer Linux than this one: build it here."),
)


@dataclass(frozen=True)
class Attention:
    """`chosen` by training's own function for a Llama in bfloat16; `rejected`: why no faster one; `error`: why the
    choice could not be asked for. `kernels`: of the layers and of the loss, and why no faster ones. `no_qlora`: why no
    base can lie in 4 bits, "" where it can."""

    chosen: str = ""
    rejected: tuple[str, ...] = ()
    error: str = ""
    kernels: tuple[str, str] = ("torch", "torch")
    kernels_rejected: tuple[str, ...] = ()
    no_qlora: str = "bitsandbytes is not installed"

    @classmethod
    def of(cls, probe: Probe) -> Attention:
        if probe.error:
            return cls(error=probe.error)
        layers, loss = probe.facts["kernels"]
        rejected, slower = (tuple(probe.facts[name]) for name in ("rejected", "kernels_rejected"))
        no_qlora = probe.facts["qlora"]
        return cls(
            probe.facts["attention"], rejected, kernels=(layers, loss), kernels_rejected=slower, no_qlora=no_qlora
        )


@dataclass(frozen=True)
class Flash:
    """The package flash-attn. `version`: None where it is not installed, "" where it does not say; `error`: of its
    import; `crashed`: the import ended the process, or never came back; `platform`: as in the name of a wheel."""

    version: str | None = None
    error: str = ""
    crashed: bool = False
    python: str = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform: str = f"linux_{platform.machine()}"


def installed() -> bool:
    return util.find_spec(PACKAGE) is not None


def version() -> str:
    """Without the build's label; "" for a package without metadata."""
    found = next(iter(metadata.distributions(name=PACKAGE)), None)
    return found.version.partition("+")[0] if found else ""


def findings(chosen: Attention, flash: Flash, torch: Torch) -> Iterator[Finding]:
    yield _choice(chosen, torch)
    yield _flash(flash, torch, chosen)
    if not chosen.error:
        yield _kernels(chosen, torch)
        yield _qlora(chosen)


def _choice(chosen: Attention, torch: Torch) -> Finding:
    if chosen.error:
        return problem("attention", f"the choice failed: {chosen.error}", "See torch, packages and program.")
    if not torch.gpus:
        kind = "torch's own function, one conversation at a time; the others need a GPU"
        return ok("attention", f"model.attention=auto would take {chosen.chosen}: {kind}")
    text = f"model.attention=auto would take {chosen.chosen}, seen to run on this GPU"
    if chosen.chosen != "sdpa":
        return ok("attention", text)
    return note("attention", f"{text}. It is slower than the others: {'; '.join(chosen.rejected)}")


def _kernels(chosen: Attention, torch: Torch) -> Finding:
    layers, loss = chosen.kernels
    text = f"model.kernels=auto would take {layers} for the layers and {loss} for the loss"
    if not torch.gpus or not chosen.kernels_rejected:
        return ok("kernels", f"{text}{'' if torch.gpus else '; the others need a GPU'}")
    why = "; ".join(chosen.kernels_rejected)
    advice = "pip install 'sftdist[liger]' for fused layers, or model.compile=true" if layers == "torch" else ""
    return ok("kernels", f"{text}: {why}", advice)


def _qlora(chosen: Attention) -> Finding:
    if not chosen.no_qlora:
        return ok("qlora", "tune.method=qlora would run: bitsandbytes was seen to")
    advice = "pip install 'sftdist[quant]' for tune.method=qlora; nothing else needs it"
    return ok("qlora", f"tune.method=qlora would be refused: {chosen.no_qlora}", advice)


def _flash(flash: Flash, torch: Torch, chosen: Attention) -> Finding:
    fits = _fitting(flash, torch)
    if flash.version is None:
        if not torch.gpus:
            return ok("flash-attn", "not installed, and not needed: it runs on NVIDIA GPUs only")
        return ok("flash-attn", f"not installed, and not needed while {chosen.chosen} runs. Who wants it:", fits)
    name = f"flash-attn {flash.version}".strip()
    if not flash.error:
        needs = "" if torch.gpus else "; there is no GPU here for it to run on"
        return ok("flash-attn", f"{flash.version or 'a version that it does not tell'}, its import works{needs}")
    if flash.crashed:
        text = f"{name} is installed, but its import {flash.error}. Training tries it, too, and would end like that"
        return problem("flash-attn", text, f"Remove it first:\n    pip uninstall flash-attn\n{fits}")
    meaning = next((text for pattern, text in _MEANINGS if re.search(pattern, flash.error)), "")
    instead = f"model.attention=auto passes it over and takes {chosen.chosen}; " if chosen.chosen else ""
    text = f"{name} is installed, but cannot be imported: {flash.error}. {meaning}".rstrip()
    return note("flash-attn", f"{text} {instead}model.attention=flash_attn is refused.", fits)


def _fitting(flash: Flash, torch: Torch) -> str:
    """What to install, in three lines; or why nothing fits."""
    if not torch.cuda:
        known = not torch.error
        return "pip uninstall flash-attn: no build of it fits a torch without CUDA." if known else "Mend torch first."
    pinned = flash.version or _NEWEST
    return (
        f"The build that fits has this name, where {_RELEASES} lists it:\n"
        f"    {wheel(pinned, flash, torch)}\n"
        f"Else have it built here, with nvcc of CUDA {torch.cuda} (it may take an hour):\n"
        f"    pip install --no-build-isolation --no-deps --no-cache-dir flash-attn=={pinned}"
    )


def wheel(pinned: str, flash: Flash, torch: Torch) -> str:
    """The file name under which flash-attn's releases hold the build for this Python, torch, CUDA and C++ library."""
    short = ".".join(torch.version.split(".")[:2])
    abi = str(torch.cxx11_abi).upper()
    cuda = (torch.cuda or "").split(".")[0]
    return f"{PACKAGE}-{pinned}+cu{cuda}torch{short}cxx11abi{abi}-{flash.python}-{flash.python}-{flash.platform}.whl"
