"""A probe of the user's own, by import path: a `Probe`, or a function without arguments that returns one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.extension import load_named, raised, require_call
from sftdist.data.rowerror import show
from sftdist.evals.metrics import Metric, Probe
from sftdist.evals.prompts import Answer, Prompt

PROBES = "evals.probes"  # the key that names them
FORM = "a sftdist.evals.metrics.Probe, or a function without arguments that returns one"


def own_probe(path: str) -> Probe:
    """The probe behind an import path; what it scores is checked against its own metrics.

    Raises ConfigError where there is none, and where `check`, `score` or `explain` of it raises or gives what is none.
    """
    found = load_named(path, PROBES)
    if not isinstance(found, Probe) and callable(found):
        require_call(found, path, PROBES, FORM)
        try:
            found = found()
        except Exception as problem:  # whatever the user's code raises
            raise ConfigError(f"{PROBES}: {path} raised {raised(problem)}; required {FORM}") from problem
    if not isinstance(found, Probe):
        raise ConfigError(f"{PROBES}: {path} gave {type(found).__name__}, required {FORM}")
    return _guarded(found, path)


def _guarded(probe: Probe, path: str) -> Probe:
    known = {metric.name: metric for metric in probe.metrics}

    def score(prompt: Prompt, answer: Answer) -> dict[str, float]:
        given = _called(lambda: probe.score(prompt, answer), path, prompt)
        if not isinstance(given, Mapping):
            raise _fault(path, prompt, f"gave {show(given)}, required a number by the name of each metric")
        return {name: _value(known, name, value, path, prompt) for name, value in given.items()}

    def check(prompt: Prompt) -> None:
        _called(lambda: probe.check(prompt), path, prompt)

    def explain(prompt: Prompt, answer: Answer) -> list[str]:
        return [str(text) for text in _called(lambda: probe.explain(prompt, answer), path, prompt)]

    return replace(probe, score=score, check=check, explain=explain)


def _called(call: Callable[[], Any], path: str, prompt: Prompt) -> Any:
    try:
        return call()
    except DataError:  # what `check` raises for a prompt that cannot be judged
        raise
    except Exception as problem:  # whatever the user's code raises
        raise _fault(path, prompt, f"raised {raised(problem)}") from problem


def _value(known: Mapping[str, Metric], name: Any, value: Any, path: str, prompt: Prompt) -> float:
    if name not in known:
        raise _fault(path, prompt, f"gave the metric {show(name)}, required one of its own: {', '.join(known)}")
    metric = known[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _fault(path, prompt, f"gave {show(value)} for {name}, required a number") from None
    low = -math.inf if metric.low is None else metric.low
    high = math.inf if metric.high is None else metric.high
    if not (math.isfinite(number) and low <= number <= high):
        raise _fault(path, prompt, f"gave {number:g} for {name}, required a number of {low:g} to {high:g}")
    return number


def _fault(path: str, prompt: Prompt, text: str) -> ConfigError:
    return ConfigError(f"{PROBES}: {path}: at {prompt.id}: {text}")
