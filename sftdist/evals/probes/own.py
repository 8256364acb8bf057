"""Metrics that a user brings along as a Python function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.core.extension import load_function
from sftdist.data.rowerror import show
from sftdist.evals.metrics import Metric
from sftdist.evals.prompts import Prompt

FUNCTIONS = "evals.functions"  # the key that names them


class OwnMetrics:
    """A user's function and the metrics that it gives."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.call: Callable[..., Any] = load_function(path, FUNCTIONS)
        name = path.rpartition(":")[2]
        declared = getattr(self.call, "metrics", None)
        self.metrics = {key: _metric(path, key, facts) for key, facts in (declared or {name: {}}).items()}
        self.only = None if declared else name

    def score(self, prompt: Prompt, answer: str) -> dict[str, float]:
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        try:
            given = self.call(messages, answer, prompt.reference, dict(prompt.checks))
        except Exception as problem:
            raise self._fault(prompt, f"given {type(problem).__name__}: {problem}, required a number") from problem
        if given is None:
            return {}
        values = given if isinstance(given, Mapping) else {self.only or next(iter(self.metrics)): given}
        return {str(key): self._value(prompt, key, value) for key, value in values.items()}

    def _value(self, prompt: Prompt, key: Any, value: Any) -> float:
        if key not in self.metrics:
            raise self._fault(prompt, f"given the metric {show(key)}, required it in the function's own `metrics`")
        metric = self.metrics[key]
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self._fault(prompt, f"given {show(value)} for {key}, required a number") from None
        low = -math.inf if metric.low is None else metric.low
        high = math.inf if metric.high is None else metric.high
        if not (math.isfinite(number) and low <= number <= high):
            bounds = f"a number of {low:g} to {high:g}; state other bounds in the function's own `metrics`"
            raise self._fault(prompt, f"given {number:g} for {key}, required {bounds}")
        return number

    def _fault(self, prompt: Prompt, text: str) -> ConfigError:
        return ConfigError(f"{FUNCTIONS}: {self.path}: at {prompt.id}: {text}")


def _metric(path: str, name: Any, facts: Any) -> Metric:
    keys = ("meaning", "low", "high", "higher_is_better")
    if not isinstance(name, str) or not name.isidentifier() or not isinstance(facts, Mapping) or set(facts) - set(keys):
        given = f"{FUNCTIONS}: {path}: metrics: given {show(name)}: {show(facts)}"
        raise ConfigError(f"{given}, required a name of letters, digits and _, with {', '.join(keys)}")
    meaning = str(facts.get("meaning", f"what {path} says of an answer"))
    return Metric(name, facts.get("higher_is_better", True), facts.get("low", 0.0), facts.get("high", 1.0), meaning)
