"""A rule of the gate: `METRIC >= NUMBER`, `METRIC >= base - NUMBER`, `METRIC >= last - NUMBER`, the same with `<=`.

A rule is text, or a mapping with `rule` and keys of its own: `confidence min_prompts doubt proven optional`. A `*` in
the metric stands for any characters: `"*.exact_match >= base - 0.02"` is held against every source that has the metric.
Prompts that the evaluation brings along are no source: their rules name them, as in `"robustness.* >= base - 0.1"`.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sftdist.core.rules import BROUGHT_ALONG
from sftdist.core.typed import nearest, shown

DOUBT = 0.1
MOST_DOUBT = 0.2
# Below, noise counts as a drop too often; above, the interval is so wide that hardly any drop counts as one.
CONFIDENCE = (0.8, 0.999)
FORM = "METRIC >= NUMBER, or METRIC >= base - NUMBER, or METRIC >= last - NUMBER, each also with <="
KEYS = ["rule", "confidence", "min_prompts", "doubt", "proven", "optional"]
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_RULE = re.compile(
    rf"(?P<metric>[^\s<>=!]+)\s*(?P<sign>>=|<=)\s*"
    rf"(?:(?P<number>[+-]?(?:{_NUMBER}))|(?P<against>base|last)(?:\s*(?P<more>[+-])\s*(?P<margin>{_NUMBER}))?)"
)


class Against(StrEnum):
    """What a metric is held against."""

    number = "number"
    base = "base"
    last = "last"


@dataclass(frozen=True)
class Rule:
    """`number` is the threshold, or what is added to the figure of the base model or of the last release.

    `doubt`: how far beyond the threshold the interval may reach, as a share of what the metric can be (of its figure,
    where it has no bounds). 0 where the rule must be proven. `optional`: a metric that is absent is no refusal.
    """

    text: str
    metric: str
    at_least: bool
    against: Against
    number: float
    confidence: float
    min_prompts: int
    doubt: float = DOUBT
    optional: bool = False

    def matches(self, metrics: Sequence[str]) -> list[str]:
        """The metrics that this rule is about."""
        pattern = re.compile(".*".join(re.escape(part) for part in self.metric.split("*")))
        others = BROUGHT_ALONG if self.metric.startswith("*") else ()
        return [name for name in metrics if pattern.fullmatch(name) and name.partition(".")[0] not in others]


def read_rules(values: Sequence[Any], *, min_prompts: int, confidence: float) -> tuple[list[Rule], list[str]]:
    """The rules of `gate.rules`, and the issues of those that cannot be read.

    `min_prompts` and `confidence` are the gate's own, for a rule that does not say.
    """
    rules: list[Rule] = []
    issues = [f"gate.{issue}" for issue in _out_of_bounds({"confidence": confidence})]
    for index, value in enumerate(values):
        given = dict(value) if isinstance(value, Mapping) else {"rule": value}
        wrong = [f"gate.rules[{index}]: {issue}" for issue in _issues(given)]
        issues += wrong
        if not issues:
            rules.append(_rule({"min_prompts": min_prompts, "confidence": confidence, **given}))
    return rules, issues


def misspelt(rules: Sequence[Rule], known: Collection[str]) -> list[str]:
    """Optional rules on metrics that nothing can measure: they would be skipped for ever. `known`: names of metrics,
    without the source."""
    found = []
    for rule in rules:
        source, dot, name = rule.metric.rpartition(".")
        if rule.optional and dot and not source.startswith("benchmarks") and not fnmatch.filter(known, name):
            near = nearest(name, sorted(known))
            meant = f"; did you mean {source}.{near}?" if near else f", required one of {', '.join(sorted(known))}"
            found.append(f"gate.rules: {rule.text}: given the metric {rule.metric}, which nothing measures{meant}")
    return found


def _rule(given: Mapping[str, Any]) -> Rule:
    found = _read(given["rule"])
    assert found is not None, "read before"
    against = Against(found["against"] or "number")
    number = float(found["number"] or found["margin"] or 0)
    return Rule(
        text=" ".join(given["rule"].split()),
        metric=found["metric"],
        at_least=found["sign"] == ">=",
        against=against,
        number=-number if found["more"] == "-" else number,
        confidence=float(given["confidence"]),
        min_prompts=int(given["min_prompts"]),
        doubt=0.0 if given.get("proven") else float(given.get("doubt", DOUBT)),
        optional=bool(given.get("optional", False)),
    )


def _read(text: Any) -> re.Match[str] | None:
    return _RULE.fullmatch(text.strip()) if isinstance(text, str) else None


def _issues(given: Mapping[str, Any]) -> Iterator[str]:
    for key in given:
        if key not in KEYS:
            near = nearest(str(key), KEYS)
            yield f"{key}: unknown key; {f'did you mean {near}?' if near else 'its keys are ' + ', '.join(KEYS)}"
    yield from _text_issues(given.get("rule"))
    yield from _out_of_bounds(given)
    if "min_prompts" in given and not (type(given["min_prompts"]) is int and given["min_prompts"] >= 1):
        yield f"min_prompts: given {shown(given['min_prompts'])}, required a whole number of at least 1"
    for key in ("proven", "optional"):
        if not isinstance(given.get(key, False), bool):
            yield f"{key}: given {shown(given[key])}, required true or false"
    if given.get("proven") and "doubt" in given:
        yield "proven and doubt: a rule that must be proven leaves no doubt; keep one of the two"


def _out_of_bounds(given: Mapping[str, Any]) -> Iterator[str]:
    for key, (least, most) in {"confidence": CONFIDENCE, "doubt": (0.0, MOST_DOUBT)}.items():
        value = given.get(key, least)
        if not (isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most):
            yield f"{key}: given {shown(value)}, required a number of {least:g} to {most:g}"


def _text_issues(text: Any) -> Iterator[str]:
    found = _read(text)
    if found is None:
        yield f"given {shown(text)}, required {FORM}"
    elif not math.isfinite(float(found["number"] or found["margin"] or 0)):
        yield f"given {shown(text)}, required a finite number"
