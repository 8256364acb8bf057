"""`sftdist doctor`: what this machine has for training, what it lacks, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sftdist.commands.doctor_checks import (
    attention,
    folders,
    gpus,
    host,
    network,
    probe,
    program,
    surroundings,
    versions,
)
from sftdist.commands.doctor_checks.attention import Attention, Flash
from sftdist.commands.doctor_checks.finding import Finding, State, as_json, names_of, render
from sftdist.commands.doctor_checks.folders import Folders
from sftdist.commands.doctor_checks.gpus import Driver, Torch
from sftdist.commands.doctor_checks.host import Host
from sftdist.commands.doctor_checks.network import Collective, Network
from sftdist.commands.doctor_checks.probe import Probe
from sftdist.commands.doctor_checks.program import Compilers
from sftdist.commands.doctor_checks.surroundings import Surroundings
from sftdist.commands.doctor_checks.versions import Versions
from sftdist.core.settings import DataSettings

_DESCRIPTION = (
    "Looks at this machine and says whether training would run here: versions, GPUs, attention, folders, limits, and "
    "two processes that really sum numbers. Takes about ten seconds, changes nothing and opens no connection beyond "
    "this machine."
)
_EPILOG = (
    "Each finding is ok, a note (training runs, but something could be better) or a problem. Exit code: 0 without a "
    "problem, else 1. Problems are: a package outside of its bounds; torch or the training program that cannot be "
    "imported; GPUs that torch cannot use; a folder that cannot be written to or has less than 1 GiB; two processes "
    "that cannot work together; RANK left in the environment. A flash-attn that cannot be imported is a note, since "
    "training passes it over, unless its import kills the process."
)


@dataclass(frozen=True)
class Facts:
    """All that was seen; `collective` is None where it was not tried."""

    versions: Versions
    torch: Torch
    driver: Driver
    visible: str | None
    attention: Attention
    flash: Flash
    loaded: Probe
    compilers: Compilers
    network: Network
    collective: Collective | None
    folders: Folders
    host: Host
    surroundings: Surroundings


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 where training would not run here. argparse ends with 2 where an argument is wrong."""
    given = _parser().parse_args(argv)
    if sys.stderr.isatty():
        print("looking; this takes about ten seconds ...", file=sys.stderr, flush=True)
    found = findings(look(given.dir, skip_collective=given.skip_collective))
    print(json.dumps(as_json(found), indent=2) if given.json else render(found), end="\n" if given.json else "")
    return 1 if names_of(found, State.problem) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sftdist doctor", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--json", action="store_true", help="the same findings as JSON, for scripts")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="where runs will be written; default: runs")
    parser.add_argument("--skip-collective", action="store_true", help="do not start two processes that sum numbers")
    return parser


def look(runs: Path, *, skip_collective: bool = False) -> Facts:
    """Ask everything. What imports a heavy or a doubtful package runs in a process of its own."""
    with ExitStack() as stack:
        children = {name: stack.enter_context(probe.module(f"probe_{name}")) for name in ("torch", "model")}
        loading = stack.enter_context(probe.importing(program.MODULE))
        trying = stack.enter_context(probe.importing(attention.PACKAGE)) if attention.installed() else None
        asked, model, loaded = children["torch"].probe(), children["model"].probe(), loading.probe()
        torch, flash = Torch.of(asked), Flash()
        if trying is not None:
            tried = trying.probe()
            flash = Flash(attention.version(), tried.error, tried.crashed)
    # After the probes: two ranks that wait for one another should not wait for the cores, too.
    collective = None if skip_collective or torch.error else network.try_collective(asked.seconds)
    return Facts(
        versions=versions.look(),
        torch=torch,
        driver=gpus.look(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        attention=Attention.of(model),
        flash=flash,
        loaded=loaded,
        compilers=program.look(),
        network=network.look(),
        collective=collective,
        folders=folders.look(runs, Path(DataSettings().store_dir), model.facts.get("hub_cache", "")),
        host=host.look(),
        surroundings=surroundings.look(model.facts.get("offline")),
    )


def findings(facts: Facts) -> list[Finding]:
    """What the facts mean, in the order in which they are shown."""
    count = len(facts.torch.gpus)
    return [
        *versions.findings(facts.versions),
        *gpus.findings(facts.torch, facts.driver, facts.visible),
        *attention.findings(facts.attention, facts.flash, facts.torch),
        *program.findings(facts.loaded, facts.torch, facts.compilers),
        *network.findings(facts.network, facts.collective, count),
        *folders.findings(facts.folders, count),
        *host.findings(facts.host, bool(facts.network.infiniband)),
        *surroundings.findings(facts.surroundings),
    ]


if __name__ == "__main__":
    sys.exit(main())
