"""The `evaluate` command: the tuned model against its base on prompts that neither was trained on.

`sftdist evaluate run.dir=R`, `torchrun ... -m sftdist.evaluate run.dir=R`, or `run(cfg)` from Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from transformers.utils import logging

from sftdist.assets import quickstart
from sftdist.core import agent, config, snapshot
from sftdist.core.distributed import World, session
from sftdist.core.errors import ConfigError
from sftdist.core.runfacts import run_facts, step_of
from sftdist.core.settings import EvaluateConfig
from sftdist.evals.advice import advise
from sftdist.evals.benchmarks import SOURCE
from sftdist.evals.engines import require_engine
from sftdist.evals.lineup import metric_names
from sftdist.evals.looks import look
from sftdist.evals.page import write_page
from sftdist.evals.report import EvalReport
from sftdist.evals.request import SuiteSpec, request_of
from sftdist.evals.suite import Evaluated, evaluate
from sftdist.evals.summary import summary
from sftdist.release.gate import Decision, decide
from sftdist.release.models import model_folder
from sftdist.release.rule import Rule, misspelt, read_rules
from sftdist.watch import watch_run

MODULE = "sftdist.evaluate"
HOLDOUT = "holdout"
Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluateResult:
    """Every score (`report`); the page, which lies beside the report and its rows; and what the gate says of it, None
    where the configuration has no rules."""

    report: EvalReport
    page: Path
    decision: Decision | None


def main() -> int:
    """The command line. Under torchrun this process is a rank; alone it answers on one device."""
    return config.main(
        EvaluateConfig,
        command,
        "evaluate",
        checks=[gate_issues, watch_issues, look_issues],
        sweep_checks=[sweep_issues],
    )


def command(cfg: EvaluateConfig) -> int:
    if cfg.watch:
        return follow(cfg)
    run(cfg)
    return agent.DONE


def gate_issues(cfg: EvaluateConfig) -> list[str]:
    """Rules of the gate that cannot be read, or could never decide anything."""
    rules, issues = read_rules(cfg.gate.rules, min_prompts=cfg.gate.min_prompts, confidence=cfg.gate.confidence)
    return issues + misspelt(rules, metric_names(cfg.evals.functions, cfg.evals.probes))


def watch_issues(cfg: EvaluateConfig) -> list[str]:
    """What a watch needs."""
    if not cfg.watch:
        return []
    run_dir = Path(str(cfg.run.dir))
    found = [] if (run_dir / snapshot.FILE).is_file() else [f"run.dir: given {run_dir}, required a run to watch"]
    if cfg.split == HOLDOUT:
        found.append(
            "split: given holdout with watch=true, required validation: each look makes the holdout less unseen"
        )
    return found


def look_issues(cfg: EvaluateConfig) -> list[str]:
    """A look at a run's holdout is written down where all others are."""
    run_dir = Path(str(cfg.run.dir))
    if cfg.split != HOLDOUT or not (run_dir / snapshot.FILE).is_file():
        return []
    own = snapshot.read_config(run_dir).data.store_dir
    if Path(own).resolve() == Path(cfg.data.store_dir).resolve():
        return []
    return [
        f"data.store_dir: given {cfg.data.store_dir} with split=holdout, but the looks at this run's holdout are "
        f"counted in {own}; leave data.store_dir out"
    ]


def sweep_issues(cfg: EvaluateConfig) -> list[str]:
    """What is searched with the holdout is held out no longer."""
    if cfg.split != HOLDOUT:
        return []
    return ["-m: a sweep may not read the holdout; choose on the validation split, then publish one model"]


def run(cfg: EvaluateConfig) -> EvaluateResult:
    """Evaluate as configured, in this process or as one rank of torchrun's; the same result on every rank."""
    with opened() as (world, say):
        return judged(cfg, spec_of(cfg, world), world, say)


def follow(cfg: EvaluateConfig) -> int:
    """`watch=true`: score every checkpoint of the run until it is over; the run's exit code."""
    with opened() as (world, say):
        spec = spec_of(cfg, world)

        def score(folder: Path, step: int) -> EvalReport:
            where = spec.folder.with_name(f"{spec.split}-step-{step:08}")
            return evaluate(replace(spec, candidate=folder, folder=where, named=False), world, say).report

        found = watch_run(Path(str(cfg.run.dir)), world, score, seconds=cfg.watch_seconds, say=say)
    if found.reason:
        print(
            f"sftdist evaluate: {found.reason}; its checkpoints are scored: where it goes on, start the watch again",
            file=sys.stderr,
        )
    return found.code


@contextmanager
def opened() -> Iterator[tuple[World, Say]]:
    """The ranks, and how rank 0 speaks."""
    logging.disable_progress_bar()
    with session() as world:
        yield world, partial(print, flush=True) if world.is_main else silent


def spec_of(cfg: EvaluateConfig, world: World) -> SuiteSpec:
    """What is asked for, on every rank: rank 0 makes what is missing, the others find it."""
    resolve = partial(named_model, cfg)
    require_engine(cfg.evals.engine.value, world.size)
    if world.is_main:
        quickstart.lay_out(cfg)
        spec = request_of(cfg, resolve, world.device)
    world.barrier()
    return spec if world.is_main else request_of(cfg, resolve, world.device)


def named_model(cfg: EvaluateConfig, key: str, name: str) -> Path:
    """The folder of the model that a key names. Raises ConfigError."""
    try:
        return model_folder(Path(cfg.registry), name, cfg.model.revision if key == "model.path" else None)
    except ConfigError as problem:
        raise ConfigError([f"{key}: {issue}" for issue in problem.issues]) from problem


def judged(
    cfg: EvaluateConfig,
    spec: SuiteSpec,
    world: World,
    say: Say,
    *,
    last: EvalReport | None = None,
    preview: bool = True,
) -> EvaluateResult:
    """Ask both models, score, hold the gate's rules against the report, and write all of it. Collective.

    `last`: the report of the last release. `preview`: nothing hangs on the gate's decision, which is left out where it
    would say nothing. A look at the holdout is written down before the first prompt is asked.
    """
    if spec.split == HOLDOUT:
        looks = look(Path(cfg.data.store_dir), spec.candidate) if world.is_main else 0
        spec = replace(spec, data={**spec.data, "looks": world.broadcast_object(looks)})
    evaluated = evaluate(spec, world, say)
    decision = None if preview and benchmarks_alone(cfg) else decided(cfg, evaluated, last)
    page = evaluated.folder / "report.html"
    if world.is_main:
        page = shown(cfg, spec, evaluated, decision, say)
    world.barrier()  # nobody leaves before the page is there
    return EvaluateResult(evaluated.report, page, decision)


def benchmarks_alone(cfg: EvaluateConfig) -> bool:
    """Only benchmarks are asked for, and no rule of the gate is about one: all of them would be refused."""
    rules = rules_of(cfg)
    return cfg.evals.probes == [SOURCE] and bool(rules) and not any(rule.metric.startswith(SOURCE) for rule in rules)


def rules_of(cfg: EvaluateConfig) -> list[Rule]:
    """The rules of the gate; `gate_issues` has those that cannot be read."""
    return read_rules(cfg.gate.rules, min_prompts=cfg.gate.min_prompts, confidence=cfg.gate.confidence)[0]


def decided(cfg: EvaluateConfig, evaluated: Evaluated, last: EvalReport | None) -> Decision | None:
    """What the gate says; None without rules."""
    rules, report = rules_of(cfg), evaluated.report
    return decide(rules, report, model_sha256=report.tuned.sha256, last=last) if rules else None


def shown(cfg: EvaluateConfig, spec: SuiteSpec, evaluated: Evaluated, decision: Decision | None, say: Say) -> Path:
    """The page, and the same in a few lines on the screen."""
    report = evaluated.report
    sound = {name: one for name, one in report.metrics.items() if one.fault() is None}
    figures = {name: one.figures(cfg.evals.confidence, cfg.evals.resamples) for name, one in sound.items()}
    for line in summary(figures, {name: one.higher_is_better for name, one in sound.items()}):
        say(line)
    for name in report.metrics.keys() - sound.keys():
        say(f"{name}: no figure: {report.metrics[name].fault()}")
    run_dir = Path(str(cfg.run.dir))
    run = run_facts(run_dir, step_of(spec.candidate)) if (run_dir / snapshot.FILE).is_file() else None
    lambdas = {} if run is None else {one.name: one.asked for one in run.mixture if one.asked is not None}
    advice = advise(report, evaluated.rows, lambdas, confidence=cfg.evals.confidence)
    for line in advice.lines():
        say(line)
    page = write_page(
        report,
        evaluated.rows,
        figures,
        evaluated.folder,
        decision=None if decision is None else asdict(decision),
        advice=advice,
        run=run,
        confidence=cfg.evals.confidence,
    )
    if decision is None and cfg.gate.rules:
        say("gate: not asked: only benchmarks were measured, and no rule is about one")
    elif decision is None:
        say("gate: none is given; choose one of conf/gate (gate=chat) or write gate.rules")
    else:
        decision.write(evaluated.folder)
        for line in decision.lines():
            say(line)
    say(f"the report: {page}")
    return page


def silent(text: str) -> None:
    """What the ranks other than 0 say."""


if __name__ == "__main__":
    sys.exit(main())
