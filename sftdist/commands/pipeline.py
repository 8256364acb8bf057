"""`sftdist pipeline +exp=X name=N ...`: prepare, train, evaluate and publish, one after another."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

from sftdist.core.agent import DONE, PREEMPTED
from sftdist.core.children import Children
from sftdist.core.config import compose
from sftdist.core.distributed import PARENT_VARIABLE, STOP_SIGNALS
from sftdist.core.errors import SftdistError
from sftdist.core.settings import EvaluateConfig, PrepareConfig, PublishConfig, TrainConfig
from sftdist.publish import release_issues

STAGES: dict[str, type[TrainConfig]] = {
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "publish": PublishConfig,
}
_ALL_KEYS = {field.name for schema in STAGES.values() for field in fields(schema)}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: that of the first stage that did not end with 0. Each stage is a process of its own."""
    given = _parser().parse_args(argv)
    try:
        stages, run_name = checked(given.overrides)
    except SftdistError as error:
        print(f"sftdist pipeline: error: {error}", file=sys.stderr)
        return error.exit_code
    if given.plan:
        own = [] if any(word.startswith("run.name=") for word in given.overrides) else [f"run.name={run_name}"]
        print("\n".join(shlex.join([stage, *words, *own]) for stage, words in stages.items()))
        return DONE
    return run_stages(stages)


def checked(overrides: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """The words of each stage, and the name of the run. Raises what any stage would, before the first."""
    stages = {stage: words_for(schema, overrides) for stage, schema in STAGES.items()}
    cfg = compose(None, stages["publish"], PublishConfig, complete=True, checks=[release_issues])
    for stage, words in stages.items():
        compose(None, words, STAGES[stage], complete=True)
    return stages, str(cfg.run.name)


def words_for(schema: type[TrainConfig], overrides: Sequence[str]) -> list[str]:
    """The words but those that are keys of other stages alone, such as `name` of publish; unknown ones stay, to be
    refused."""
    foreign = _ALL_KEYS - {field.name for field in fields(schema)}
    return [word for word in overrides if re.split(r"[.=@]", word.lstrip("+~"), maxsplit=1)[0] not in foreign]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftdist pipeline",
        usage="sftdist pipeline +exp=NAME name=RELEASE [KEY=VALUE ...]",
        description="Prepare, train, evaluate and publish, one after another; each stage gets the words that it knows. "
        "The first stage that does not end with 0 ends the pipeline with its exit code; the same line goes on where it "
        "was. On SLURM, slurm/pipeline.sbatch makes a job of each stage.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for each stage; sftdist publish --help")
    parser.add_argument("--plan", action="store_true", help="check, print the words of each stage, and end")
    return parser


def run_stages(stages: Mapping[str, Sequence[str]]) -> int:
    """Run the stages, each with its words, to the end or to the first one that fails; its exit code."""
    names = list(stages)
    for number, (stage, words) in enumerate(stages.items(), 1):
        print(f"pipeline: stage {number} of {len(stages)}: sftdist {stage} {shlex.join(words)}", flush=True)
        code = run_stage(stage, words)
        if code:
            print(f"sftdist pipeline: {_ended(stage, code, names[number:])}", file=sys.stderr, flush=True)
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
