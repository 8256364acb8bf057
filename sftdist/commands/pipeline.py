"""`sftdist pipeline +exp=X ...`: prepare, train, evaluate and publish, one after another, with the same overrides."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import util

from sftdist import cli
from sftdist.core import config
from sftdist.core.agent import DONE, PREEMPTED
from sftdist.core.children import Children
from sftdist.core.distributed import PARENT_VARIABLE, STOP_SIGNALS
from sftdist.core.errors import SftdistError

STAGES = ("prepare", "train", "evaluate", "publish")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: that of the first stage that did not end with 0. Each stage is a process of its own."""
    given = _parser().parse_args(argv)
    stages = [name for name in STAGES if name in cli.COMMANDS and util.find_spec(cli.COMMANDS[name][0])]
    if missing := [name for name in STAGES if name not in stages]:
        print(
            f"pipeline: without {' and '.join(missing)}: this version of sftdist has no such command", file=sys.stderr
        )
    if given.stages:
        print("\n".join(stages))
        return DONE
    try:
        config.compose(None, given.overrides, complete=True)  # a typo is found before the data has been prepared
    except SftdistError as error:
        print(f"sftdist pipeline: error: {error}", file=sys.stderr)
        return error.exit_code
    return run_stages(stages, given.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftdist pipeline",
        usage="sftdist pipeline +exp=NAME [KEY=VALUE ...]",
        description="Prepare, train, evaluate and publish, one after another, with the same overrides. The first stage "
        "that does not end with 0 ends the pipeline with its exit code; the same line goes on where it was. On SLURM, "
        "slurm/pipeline.sbatch makes a job of each stage.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for each stage; sftdist train --help")
    parser.add_argument("--stages", action="store_true", help="print the stages of this version and end")
    return parser


def run_stages(stages: Sequence[str], overrides: Sequence[str]) -> int:
    """Run the stages to the end or to the first one that fails; its exit code."""
    for number, stage in enumerate(stages, 1):
        print(f"pipeline: stage {number} of {len(stages)}: sftdist {stage} {shlex.join(overrides)}", flush=True)
        code = run_stage(stage, overrides)
        if code:
            print(f"sftdist pipeline: {_ended(stage, code, stages[number:])}", file=sys.stderr, flush=True)
            return code
    print(f"pipeline: done, {', '.join(stages)}", flush=True)
    return DONE


def _ended(stage: str, code: int, left: Sequence[str]) -> str:
    how = "was stopped" if code == PREEMPTED else f"failed with exit code {code}"
    not_run = f"; not run: {', '.join(left)}" if left else ""
    return f"{stage} {how}{not_run}; the same line goes on from there"


def run_stage(stage: str, overrides: Sequence[str]) -> int:
    """One stage as a child process, which gets the stop signals of this one."""
    command = [sys.executable, "-m", "sftdist.cli", stage, *overrides]
    with Children() as children:
        code = children.start(command, {**os.environ, PARENT_VARIABLE: str(os.getpid())}).wait()
    if children.seen and -code in STOP_SIGNALS:  # it has nothing to save
        return PREEMPTED
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
