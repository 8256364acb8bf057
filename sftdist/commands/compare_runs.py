"""What `compare` knows of each run: from its directory, its report of the validation split and the gate's preview."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sftdist.core import snapshot
from sftdist.core.agent import read_status
from sftdist.core.errors import ConfigError, GateError
from sftdist.core.runfacts import RunFacts, run_facts
from sftdist.core.storage import read_manifest
from sftdist.core.sweep import DEFAULT_METRIC
from sftdist.evals.advice import main_metric
from sftdist.evals.report import REPORT, EvalReport
from sftdist.release.gate import DECISION, Decision

# Runs are chosen by what they do on the validation split: a holdout that is used to choose is none any more.
SPLIT = "validation"
NO_GATE, STALE_GATE = "no gate", "of another report"
OTHER_EXPORT = "its report is of another export: evaluate it again"


@dataclass(frozen=True)
class Run:
    """`report` None: not evaluated, or of another export (then `fault` says so). `gate` in a word or two."""

    label: str
    facts: RunFacts
    state: str
    report: EvalReport | None
    decision: Decision | None
    gate: str
    fault: str | None = None


def read_run(run_dir: Path, label: str) -> Run:
    """Raises ConfigError where it is no run or its configuration cannot be read, GateError for a damaged report."""
    facts, status = run_facts(run_dir), read_status(run_dir)
    state = "not started" if status is None else str(status["state"])
    folder = run_dir / "report" / SPLIT
    if not (folder / REPORT).is_file():
        return Run(label, facts, state, None, None, "", "not evaluated: sftdist evaluate run.dir=" + str(run_dir))
    report = EvalReport.read(folder / REPORT)
    if _exported_again(report):
        return Run(label, facts, state, None, None, "", OTHER_EXPORT)
    decision = Decision.read(folder / DECISION) if (folder / DECISION).is_file() else None
    if decision is not None and decision.report != report.sha256:
        return Run(label, facts, state, report, None, STALE_GATE)
    return Run(label, facts, state, report, decision, NO_GATE if decision is None else decision.in_short())


def _exported_again(report: EvalReport) -> bool:
    """Whether the folder of the model holds other files by now; its manifest says so without reading them."""
    folder = Path(report.tuned.path)
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError):  # removed since, or it never had one: nothing speaks against the report
        return False
    return any(name in entries and entries[name]["sha256"] != sha for name, sha in report.tuned.files.items())


# --- figures ------------------------------------------------------------------------------------------


def metrics_of(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    """The metrics to show: those of `patterns` (`*` stands for any characters), else those that the gates are about,
    else the main one of each source. Raises ConfigError for a pattern that nothing matches."""
    known = list(dict.fromkeys(name for run in runs if run.report for name in run.report.metrics))
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ConfigError(f"--metric {pattern}: no such metric was measured; {_there(known)}")
        return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
    decisions = [run.decision for run in runs if run.decision is not None]
    gated = {verdict.metric for decision in decisions for verdict in decision.verdicts}
    return [name for name in known if name in (gated or set(_main(runs)))]


def _main(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        if run.report is not None:
            for source in dict.fromkeys(name.partition(".")[0] for name in run.report.metrics):
                name = main_metric(source, run.report.metrics)
                yield from [] if name is None else [f"{source}.{name}"]


def _there(names: Sequence[str]) -> str:
    return f"there are {', '.join(names)}" if names else "no run has a report; run sftdist evaluate first"


def figures_of(run: Run, names: Sequence[str], confidence: float) -> dict[str, dict[str, Any]]:
    """Of each metric that the run has: the tuned model's figure, and its change against the base, with intervals."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        scores = None if run.report is None else run.report.metrics.get(name)
        if scores is None or scores.fault():
            continue
        one = scores.figures(confidence)
        change = None if one.change is None else asdict(one.change)
        found[name] = {**asdict(one.tuned), "prompts": one.n, "change": change, "better": scores.higher_is_better}
    return found


def sorted_by(runs: Sequence[Run], key: str, figures: Mapping[str, Mapping[str, Any]]) -> list[Run]:
    """The best first, those without the figure last. `figures`: by label. Raises ConfigError for an unknown key."""
    worth = {run.label: _worth(run, key, figures[run.label]) for run in runs}
    if all(value is None for value in worth.values()):
        plain = ["label", "steps", "seconds", DEFAULT_METRIC]
        named = list(dict.fromkeys(name for found in figures.values() for name in found))
        raise ConfigError(f"--sort {key}: no run has it; {_there([*plain, *named])}")
    return sorted(runs, key=lambda run: (worth[run.label] is None, worth[run.label] or 0))


def _worth(run: Run, key: str, figures: Mapping[str, Any]) -> Any:
    """What is sorted by; smaller is better."""
    if key in ("label", "steps", "seconds"):
        return {"label": run.label, "steps": run.facts.steps, "seconds": run.facts.seconds}[key]
    if key in figures:
        value = figures[key]["value"]
        return -value if figures[key]["better"] is not False else value
    return run.facts.last(key) if key == DEFAULT_METRIC else None


# --- what differs -------------------------------------------------------------------------------------


def differences(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By key of the configuration the value of each run, by label, where not all are the same.

    Only what decides what is trained; the mixture has a column of its own.
    """
    configs = {run.label: snapshot.from_dict(run.facts.config) for run in runs}
    first = next(iter(configs.values()))
    found = {label: snapshot.differences(first, cfg) for label, cfg in configs.items()}
    keys = dict.fromkeys(key for differing in found.values() for key in differing if not key.endswith(".lam"))
    before = {key: old for differing in found.values() for key, (old, _) in differing.items()}
    return {key: {label: found[label].get(key, (None, before[key]))[1] for label in configs} for key in keys}


def notes(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """What keeps the figures of two runs from being compared."""
    judged = [run for run in runs if run.report is not None]
    found = [f"{run.label}: {run.fault}" for run in runs if run.fault is not None]
    for name in names:
        asked = {run.label: prompts for run in judged if (prompts := _asked(run.report, name))}
        first = next(iter(asked.values()), None)
        others = [label for label, prompts in asked.items() if prompts != first]
        if others:
            one = next(iter(asked))
            found.append(f"{name}: {', '.join(others)} had other prompts than {one}; these figures do not compare")
    for what in ("engine", "dtype", "max_new_tokens", "greedy"):
        values = {run.label: run.report.decoding.get(what) for run in judged if run.report is not None}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{label} {value}" for label, value in values.items())
            found.append(f"the models answered with different {what}: {said}")
    return found


def _asked(report: EvalReport | None, name: str) -> list[tuple[str, str | None]]:
    """The prompts of a metric, each with the hash of what it says."""
    if report is None or name not in report.metrics:
        return []
    return sorted((id, report.asked.get(id)) for id in report.metrics[name].ids)


def readable(run_dirs: Sequence[Path]) -> list[Run]:
    """All runs, each with a label of its own: its name, or its directory where two have one name. Raises ConfigError
    with every directory that cannot be read."""
    issues: list[str] = []
    names = [path.resolve().name for path in run_dirs]
    found = []
    for path, name in zip(run_dirs, names, strict=True):
        try:
            found.append(read_run(path, name if names.count(name) == 1 else str(path)))
        except (ConfigError, GateError) as error:
            issues.append(str(error))
    if issues:
        raise ConfigError(issues)
    return found
