"""Which prompts are asked and which probes score the answers: what `evals.*` asks for, as objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.extension import is_import_path, source_of
from sftdist.data.contract import Contract
from sftdist.evals.adversarial import adversarial_prompts
from sftdist.evals.endpoint import Endpoint
from sftdist.evals.metrics import Probe
from sftdist.evals.policy import policy_prompts
from sftdist.evals.probes.behaviour import behaviour_probe
from sftdist.evals.probes.classifier import Classifier
from sftdist.evals.probes.contract import contract_probe
from sftdist.evals.probes.format import format_probe
from sftdist.evals.probes.judge import Judge
from sftdist.evals.probes.own_probe import own_probe
from sftdist.evals.probes.robustness import KINDS, variants
from sftdist.evals.probes.safety import CLASSIFIED, JUDGED, UNJUDGED, safety_probe
from sftdist.evals.probes.task import task_probe
from sftdist.evals.prompts import Prompt

SCORING = ("task", "behaviour", "format", "contract", "safety")  # probes that score every answer
PROBES = (*SCORING, "robustness", "loss", "benchmarks")
CHECKS = (  # what a row's `checks` may hold
    *("stance", "forbidden", "instructions", "choices"),
    *("schema", "required_keys", "table", "regex", "tool_calls"),
)


@dataclass(frozen=True)
class Measures:
    """What is measured. `contracts` and `schemas` are by source; `policy` names files; `robustness` kinds of variants,
    of at most `robustness_prompts` prompts a source."""

    probes: Sequence[str]
    contracts: Mapping[str, Contract] = field(default_factory=dict)
    schemas: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    functions: Sequence[str] = ()
    policy: Any = None
    adversarial: bool = True
    robustness: Sequence[str] = ()
    robustness_prompts: int = 50
    classifier: str | None = None
    unsafe_label: str = "unsafe"
    judge: Endpoint | None = None
    rubric: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.probes if name not in PROBES and not is_import_path(name)]:
            names = f"{', '.join(PROBES)}, or package.module:name"
            raise ConfigError(f"evals.probes: given {unknown[0]}, required some of {names}")


def require_probes(probes: Sequence[str]) -> None:
    """Raises ConfigError where nothing would be measured, or nothing that robustness could be measured by."""
    scoring = any(scores(name) for name in probes)
    if not scoring and (not probes or "robustness" in probes):
        given, needed = ", ".join(probes) or "none", ", ".join(SCORING)
        raise ConfigError(f"evals.probes: given {given}, required one that scores answers, too: {needed}")


def scores(name: str) -> bool:
    """Whether a probe, one of the user's own too, scores every answer."""
    return name in SCORING or is_import_path(name)


def probes_of(measures: Measures) -> list[Probe]:
    """The probes that score answers, in the order of `SCORING`, the user's own last. Raises ConfigError for one that
    cannot be built."""
    builders = {
        "task": lambda: task_probe(measures.functions),
        "behaviour": behaviour_probe,
        "format": lambda: format_probe(measures.schemas),
        "contract": lambda: contract_probe(measures.contracts),
        "safety": lambda: _safety(measures),
    }
    probes = [builders[name]() for name in SCORING if name in measures.probes]
    _refuse_twice(probes, "evals.functions")
    probes += [own_probe(name) for name in dict.fromkeys(measures.probes) if is_import_path(name)]
    _refuse_twice(probes, "evals.probes")
    return probes


def code_of(measures: Measures) -> dict[str, str]:
    """The functions and probes of the user's own, each with the hash of its source: what a report was made with."""
    named = [("evals.functions", path) for path in measures.functions]
    named += [("evals.probes", path) for path in measures.probes if is_import_path(path)]
    return {path: source_of(path, key)["sha256"] for key, path in named}


def _refuse_twice(probes: Sequence[Probe], key: str) -> None:
    counts = Counter(metric.name for probe in probes for metric in probe.metrics)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ConfigError(f"{key}: given the metric {twice[0]}, which there is already; give it another name")


def metric_names(functions: Sequence[str], probes: Sequence[str] = ()) -> set[str]:
    """Whatever can be measured of a source, and the kinds of robustness; `functions`, `probes`: as in the settings, of
    which the user's own count.

    Raises ConfigError for one that cannot be loaded.
    """
    own = [own_probe(name) for name in probes if is_import_path(name)]
    ours = (task_probe(functions), behaviour_probe(), format_probe({}), contract_probe({}), safety_probe(None, None))
    scored = {metric.name for probe in (*ours, *own) for metric in probe.metrics}
    return scored | {CLASSIFIED.name, JUDGED.name, UNJUDGED.name, "loss", *KINDS}


def _safety(measures: Measures) -> Probe:
    classifier = None if measures.classifier is None else Classifier.load(measures.classifier, measures.unsafe_label)
    judge = None if measures.judge is None else Judge.of(measures.judge, measures.rubric)
    return safety_probe(classifier, judge)


def prompts_of(questions: Sequence[Prompt], measures: Measures) -> list[Prompt]:
    """The questions of the data, those that probes bring along, and the same questions in other words.

    Raises ConfigError where a source of the data has the name of a set of prompts.
    """
    brought = [*_brought(measures)]
    if twice := {prompt.source for prompt in brought} & {prompt.source for prompt in questions}:
        name = sorted(twice)[0]
        raise ConfigError(f"data.sources.{name}: given the name of a set of prompts, required another name")
    again = _first_of_each_source(questions, measures.robustness_prompts) if "robustness" in measures.probes else []
    return [*questions, *brought, *variants(again, measures.robustness, measures.seed)]


def _brought(measures: Measures) -> Iterator[Prompt]:
    if "safety" in measures.probes:
        yield from [] if measures.policy is None else policy_prompts(measures.policy)
    if measures.adversarial:
        yield from adversarial_prompts()


def refuse_unknown_checks(prompt: Prompt, measures: Measures) -> None:
    """Raises DataError for a check that nobody would carry out; a user's own functions may know others."""
    own = measures.functions or any(map(is_import_path, measures.probes))
    unknown = [] if own else [name for name in prompt.checks if name not in CHECKS]
    if unknown:
        raise DataError(
            f"prompt {prompt.id}: given checks.{unknown[0]}, which no probe knows, required some of {', '.join(CHECKS)}"
        )


def _first_of_each_source(questions: Sequence[Prompt], most: int) -> list[Prompt]:
    by_source = groupby(sorted(questions, key=lambda prompt: prompt.source), key=lambda prompt: prompt.source)
    return [prompt for _, several in by_source for prompt in list(several)[:most]]
