"""What is written: every file by its name below the folder, and the check that the experiment is a right one."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftdist.commands.init_parts import pages
from sftdist.commands.init_parts.answer_kind import Kind
from sftdist.commands.init_parts.machine import A_NODE
from sftdist.commands.init_parts.rules import chat_preset, min_prompts_of, rules_of
from sftdist.commands.init_parts.value import Value
from sftdist.commands.init_parts.values import Seen, kind_in_words, values_of
from sftdist.core.rules import check
from sftdist.core.settings import TrainConfig
from sftdist.core.shipped import shipped_folder
from sftdist.core.snapshot import read_values

SPARE = 1.5  # of the predicted time: the prediction is good to a third
BESIDE = 0.5  # hours for preparing, evaluating and publishing
CPU_HOURS = 12  # where nothing predicts well
CORES = {"cuda": 8, "cpu": 4}  # of one rank


def texts_of(seen: Seen, folder: Path) -> dict[str, str]:
    """File names with their texts. Paths of the user's are as they were typed, or absolute where `folder` is another
    than the working directory."""
    seen = _from_there(seen, folder)
    values = values_of(seen)
    _require_right(values)
    name = seen.name
    found = {
        f"conf/exp/{name}.yaml": pages.experiment(name, _head(seen), values, _zero(seen)),
        f"conf/gate/{name}.yaml": _gate(seen),
        f"slurm/{name}.sbatch": _job(seen),
    }
    if seen.contract is not None:
        head = [
            f"What the answers of {seen.data.path} have in common, seen by sftdist init in {seen.data.seen}: "
            f"{kind_in_words(seen)}.",
            "prepare holds the training answers against it, evaluate the model's. Correct what is not meant.",
        ]
        found[seen.contract] = pages.contract(head, seen.data.answers.contract)
    return found


def _from_there(seen: Seen, folder: Path) -> Seen:
    if folder.resolve() == Path.cwd():
        return seen
    return replace(
        seen,
        model=replace(seen.model, path=_absolute(seen.model.path)),
        data=replace(seen.data, path=_absolute(seen.data.path)),
        val=None if seen.val is None else _absolute(seen.val),
    )


def _absolute(path: str) -> str:
    """A local path; a name of the Hub stays."""
    if path.startswith(("hub:", "~")) or (not Path(path).exists() and "*" not in path):
        return path
    return str(Path.cwd() / path)


def _require_right(values: Sequence[Value]) -> None:
    """What is written has to be a configuration that runs: anything else is a fault of ours."""
    tree: dict[str, Any] = {}
    for value in values:
        *sections, leaf = value.key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value.value
    issues: list[str] = []
    cfg = read_values(tree, TrainConfig, issues)
    issues += check(cfg)
    assert not issues, issues


def _head(seen: Seen) -> list[str]:
    plan = f" {seen.machine.plan_words}" if seen.machine.plan_words else ""
    return [
        f"Written by sftdist init for {seen.model.path} and {seen.data.path}, on {seen.machine}. Every value is yours "
        "to change; what is not here has its default (sftdist train --help).",
        f"  sftdist prepare +exp={seen.name}",
        f"  sftdist plan +exp={seen.name}{plan}",
        f"  sftdist train +exp={seen.name}",
    ]


def _zero(seen: Seen) -> tuple[int, str]:
    stage, machine = seen.fit.choice.cfg.zero.stage, seen.machine
    if machine.cluster.gpus == 1:
        return stage, "One rank: there is nothing to share out. With more, sftdist train auto=true chooses anew."
    shared = ("nothing", "masters and optimizer", "masters, optimizer and gradients", "the weights, too")[stage]
    return stage, f"ZeRO shares out {shared}: the fastest stage that fits on {machine}, by the planner."


def _gate(seen: Seen) -> str:
    held_out = round(seen.fit.size.held_out * seen.data.usable)
    least, why = min_prompts_of(held_out)
    head = [
        f"Gate of {seen.name}, by sftdist init: {kind_in_words(seen)}. It judges on the holdout: sftdist publish "
        f"run.dir=R name={seen.name}",
        "A rule on base fails where the interval says that it is worse than allowed, and is refused where the prompts "
        "are too few to tell.",
        "",
    ]
    if seen.data.answers.kind is Kind.text:
        first = "".join(f"# {line}\n" for line in (f"{head[0]}", "The rules are those of gate=chat:"))
        return first + chat_preset(least, why)
    return pages.gate(head, least, why, rules_of(seen.data.answers))


def _job(seen: Seen) -> str:
    machine = seen.machine
    gpus = machine.cluster.gpus
    each = min(A_NODE, gpus)
    kind = "cpu" if machine.on_cpu else "cuda"
    cpus = CORES[kind] * each
    resources = [] if machine.on_cpu else [f"#SBATCH --gpus-per-node={each}"]
    hours, why = _hours(seen)
    values = {
        "NAME": seen.name,
        "RESOURCES": "\n".join([*resources, f"#SBATCH --cpus-per-task={cpus}"]),
        "TIME": f"{hours:02d}:00:00",
        "WHY_TIME": why,
        "ROOT": shlex.quote(str(shipped_folder("slurm").parent)),
        "NODES": str(-(-gpus // A_NODE)),
        "GPUS": str(each),
        "CPUS": str(cpus),
    }
    return pages.job("nodes" if gpus > A_NODE else "node", values)


def _hours(seen: Seen) -> tuple[int, str]:
    if seen.machine.on_cpu:
        return CPU_HOURS, "The time is a guess: on CPUs nothing predicts it well."
    train = seen.fit.size.steps * seen.fit.choice.terms.total / 3600
    return math.ceil(BESIDE + SPARE * train), f"The planner says {train:.1f} hours of training; the time has room."
