"""Whether a model may leave: every rule is held against the report of an evaluation, and says in figures why.

A rule passes only where the figures show it. What cannot be decided is refused: too few prompts, an interval that is
too wide, a metric that is not there or whose scores are damaged, a report of another model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from sftdist.core.errors import GateError
from sftdist.core.storage import read_json, write_json
from sftdist.core.table import columns
from sftdist.core.typed import nearest
from sftdist.evals.report import Estimate, EvalReport, Figures, Scores
from sftdist.release.rule import Against, Rule

DECISION_FORMAT = 1
DECISION = "decision.json"
_ROUNDING = 1e-9


class Outcome(StrEnum):
    """What came of a rule. Only `passed` speaks for the model; `skipped` speaks for nothing."""

    passed = "passed"
    failed = "failed"
    refused = "refused"
    skipped = "skipped"


@dataclass(frozen=True)
class Verdict:
    """A rule, held against one metric.

    `value low high` are what was judged: the figure of the tuned model, or for a rule on base or last the change
    against that. `threshold` is what it must reach, `tuned` and `other` the figures of both models. What is not known
    is None.
    """

    rule: str
    metric: str
    outcome: Outcome
    words: str
    prompts: int | None = None
    tuned: float | None = None
    other: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Decision:
    """The gate's decision on exactly one model: the one with the files of `model` (sha256).

    `reasons`: why nothing could be decided at all. `report`: sha256 of the report that was read, `base` and `last`:
    sha256 of the models that it was compared with.
    """

    passed: bool
    reasons: list[str]
    verdicts: list[Verdict]
    model: str
    base: str | None
    last: str | None
    split: str
    report: str
    format: int = DECISION_FORMAT

    def write(self, folder: Path) -> Path:
        """`folder/decision.json`, in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / DECISION
        write_json(path, asdict(self))
        return path

    @classmethod
    def read(cls, path: Path) -> Decision:
        """The decision in a file. Raises GateError where it is none, or one of another version."""
        found: Any = read_json(path) if path.is_file() else None
        if not isinstance(found, dict) or found.get("format") != DECISION_FORMAT:
            raise GateError(f"{path}: given no decision of format {DECISION_FORMAT}; run sftdist publish again")
        verdicts = [Verdict(**{**one, "outcome": Outcome(one["outcome"])}) for one in found["verdicts"]]
        return cls(**{**found, "verdicts": verdicts})

    def in_short(self) -> str:
        """`passed`, or how many rules stop the model, for a cell of a table."""
        if self.passed:
            return "passed"
        outcomes = [verdict.outcome for verdict in self.verdicts]
        counts = {outcome: outcomes.count(outcome) for outcome in (Outcome.failed, Outcome.refused)}
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "refused"

    def lines(self) -> list[str]:
        """The decision for a terminal or a log: a line per rule, those that stop the model first."""
        order = [Outcome.failed, Outcome.refused, Outcome.skipped, Outcome.passed]
        rows = sorted(self.verdicts, key=lambda verdict: order.index(verdict.outcome))
        table = [line.rstrip() for line in columns([(one.outcome, one.metric, one.words) for one in rows])]
        return [f"gate: {'passed' if self.passed else 'not passed'}", *self.reasons, *(table if rows else [])]


class _Refused(Exception):
    """Why a rule decides nothing for one metric."""


def decide(
    rules: Sequence[Rule],
    report: EvalReport,
    *,
    model_sha256: str,
    base_sha256: str | None = None,
    split: str | None = None,
    last: EvalReport | None = None,
) -> Decision:
    """Hold every rule against the report.

    `model_sha256`: the model that is to leave; `base_sha256`: the one it must have been compared with, where that is
    known; `split`: the one that must have been read; `last`: the report of the last release, None where there is none.
    """
    reasons = list(_mistaken(report, model_sha256, base_sha256, split))
    verdicts = [] if reasons else [verdict for rule in rules for verdict in _verdicts(rule, report, last)]
    outcomes = {verdict.outcome for verdict in verdicts}
    if not rules:
        reasons.append("gate.rules: given none, required at least one; choose gate=chat, or write rules")
    elif not reasons and outcomes <= {Outcome.skipped}:
        reasons.append("gate.rules: no rule decides anything for this model; required one at least that does")
    return Decision(
        passed=not reasons and outcomes <= {Outcome.passed, Outcome.skipped},
        reasons=reasons,
        verdicts=verdicts,
        model=model_sha256,
        base=None if report.base is None else report.base.sha256,
        last=None if last is None else last.tuned.sha256,
        split=report.split,
        report=report.sha256,
    )


def _mistaken(report: EvalReport, model: str, base: str | None, split: str | None) -> list[str]:
    """Why this is not the report of this model."""
    found = []
    if not model or report.tuned.sha256 != model:
        found.append(f"report: given one of model {report.tuned.sha256[:12]}, required one of {model[:12]}")
    if base is not None and (report.base is None or report.base.sha256 != base):
        given = "no base model" if report.base is None else f"base {report.base.sha256[:12]}"
        found.append(f"report: given a comparison with {given}, required one with {base[:12]}")
    if split is not None and report.split != split:
        found.append(f"report: given one of the {report.split} split, required one of the {split} split")
    return [f"{reason}; run sftdist evaluate again" for reason in found]


def _verdicts(rule: Rule, report: EvalReport, last: EvalReport | None) -> list[Verdict]:
    names = rule.matches(sorted(report.metrics))
    if names:
        found = [_verdict(rule, name, report, last) for name in names]
        return found if rule.optional else [*found, *_silent(rule, report)]
    if rule.optional:
        return [Verdict(rule.text, rule.metric, Outcome.skipped, "not measured, and optional")]
    return [Verdict(rule.text, rule.metric, Outcome.refused, _absent(rule.metric, sorted(report.metrics)))]


def _absent(metric: str, measured: Sequence[str]) -> str:
    """What was measured instead, and what to do."""
    near = nearest(metric, list(measured))
    meant = f"did you mean {near}" if near else None
    source, sources = metric.rpartition(".")[0], sorted({name.rpartition(".")[0] for name in measured})
    if not source or "*" in source or source in sources:
        return f"no metric of this name was measured; {f'{meant}?' if meant else f'measured are {_some(measured)}'}"
    other = "choose a gate that names no source, such as gate=chat, or write gate.rules for yours"
    return f"nothing of {source} was measured, only of {_some(sources)}; {f'{meant}? Or ' if meant else ''}{other}"


def _silent(rule: Rule, report: EvalReport) -> list[Verdict]:
    """A `*` is every source of the data: one of which nothing was measured is not passed over."""
    if not rule.metric.startswith("*"):
        return []
    silent = [name for name in report.data.get("sources", ()) if not _measured(name, report)]
    words = f"no row of it is in the {report.split} split; hold out more of it, or leave it out of the data"
    return [Verdict(rule.text, f"{name}.*", Outcome.refused, words) for name in silent]


def _measured(source: str, report: EvalReport) -> bool:
    return any(name.startswith(f"{source}.") for name in report.metrics)


def _verdict(rule: Rule, name: str, report: EvalReport, last: EvalReport | None) -> Verdict:
    if rule.against == Against.last and last is None:
        return Verdict(rule.text, name, Outcome.skipped, "there is no earlier release to compare with")
    if rule.against == Against.last and last is not None and last.tuned.sha256 == report.tuned.sha256:
        return Verdict(rule.text, name, Outcome.skipped, "this is the last release itself, byte by byte")
    try:
        scores = _scores(rule, name, report, last)
        return _judged(rule, name, scores)
    except _Refused as refused:
        return Verdict(rule.text, name, Outcome.refused, str(refused))


def _scores(rule: Rule, name: str, report: EvalReport, last: EvalReport | None) -> Scores:
    """The scores that a rule is about; in `base` those of the model that it compares with."""
    scores = report.metrics[name]
    _require(scores.fault())
    if rule.against == Against.number:
        return replace(scores, base=None)
    if rule.against == Against.last:
        assert last is not None, "rules on no release are skipped"
        return _beside_last(name, scores, report, last)
    if scores.base is None or report.base is None:
        raise _Refused("the base model was not asked; run sftdist evaluate with base=FOLDER")
    if report.base.sha256 == report.tuned.sha256:
        raise _Refused("this is the base model itself: nothing was learned, and nothing can be compared")
    return scores


def _beside_last(name: str, scores: Scores, report: EvalReport, last: EvalReport) -> Scores:
    """The scores of the prompts that the last release was asked word for word, both models'."""
    then = last.metrics.get(name)
    if then is None:
        raise _Refused("the last release was not measured so; evaluate it again")
    _require(then.fault())
    for what in ("engine", "dtype", "max_new_tokens", "greedy"):
        now, before = report.decoding.get(what), last.decoding.get(what)
        if now != before:
            raise _Refused(f"the last release answered with {what}={before}, this model with {what}={now}")
    if (then.low, then.high, then.higher_is_better) != (scores.low, scores.high, scores.higher_is_better):
        raise _Refused("the metric meant something else in the report of the last release; evaluate it again")
    values = dict(zip(then.ids, then.tuned, strict=True))
    same = [
        index
        for index, id in enumerate(scores.ids)
        if id in values and id in report.asked and report.asked[id] == last.asked.get(id)
    ]
    if not same:
        raise _Refused(f"none of these {len(scores.ids)} prompts was asked of the last release; evaluate it again")
    ids = [scores.ids[index] for index in same]
    return replace(
        scores,
        ids=ids,
        tuned=[scores.tuned[index] for index in same],
        base=[values[id] for id in ids],
        weights=None if scores.weights is None else [scores.weights[index] for index in same],
    )


def _judged(rule: Rule, name: str, scores: Scores) -> Verdict:
    """A rule against scores without faults."""
    figures = scores.figures(rule.confidence)
    found = figures.tuned if figures.change is None else figures.change
    other = None if figures.base is None else figures.base.value
    scale = _scale(scores, rule.number if other is None else other)
    outcome, words = _outcome(rule, found, scale, figures.n)
    if refusal := _vacuous(rule, scores, scale) or _too_few(rule, scores, figures):
        outcome, words = Outcome.refused, refusal
    return Verdict(
        rule.text,
        name,
        outcome,
        words,
        prompts=figures.n,
        tuned=figures.tuned.value,
        other=other,
        value=found.value,
        low=found.low,
        high=found.high,
        threshold=rule.number,
        confidence=rule.confidence,
    )


def _too_few(rule: Rule, scores: Scores, figures: Figures) -> str | None:
    if figures.effective >= rule.min_prompts:
        return None
    alike = "" if scores.weights is None else f", by their weights as good as {figures.effective:.0f},"
    return f"{figures.n} prompts{alike} decide nothing; required {rule.min_prompts} at least"


def _outcome(rule: Rule, found: Estimate, scale: float, n: int) -> tuple[Outcome, str]:
    """What the interval says: worse than the threshold, not worse beyond doubt, or neither."""
    sign, relative = (1 if rule.at_least else -1), rule.against != Against.number
    worst, best = (found.low, found.high) if rule.at_least else (found.high, found.low)
    form = "+.3f" if relative else ".3f"
    what = f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
    what += f" against {rule.against}, {n} prompts" if relative else f", {n} prompts"
    if relative and sign * (best - rule.number) < -_ROUNDING:
        return Outcome.failed, f"{what}: worse than {rule.number:+g} allows"
    if not relative and sign * (found.value - rule.number) < -_ROUNDING:
        return Outcome.failed, f"{what}: required {'at least' if rule.at_least else 'at most'} {rule.number:g}"
    if sign * (worst - rule.number) + rule.doubt * scale >= -_ROUNDING:
        return Outcome.passed, what
    return Outcome.refused, f"{what}: {worst:{form}} cannot be ruled out; {_needed(rule, found.value, worst, scale, n)}"


def _needed(rule: Rule, value: float, worst: float, scale: float, n: int) -> str:
    """What would let the rule pass: more prompts, where the figure stays."""
    room = (value - rule.number) * (1 if rule.at_least else -1) + rule.doubt * scale
    if room <= 0:
        return "with this figure no number of prompts would do; required a better model"
    return f"required about {math.ceil(n * ((value - worst) / room) ** 2 / 10) * 10} prompts with such figures"


def _scale(scores: Scores, other: float) -> float:
    """How far apart two figures of this metric can be; without bounds, how large the figure is."""
    return abs(other) if scores.low is None or scores.high is None else scores.high - scores.low


def _vacuous(rule: Rule, scores: Scores, scale: float) -> str | None:
    """Why no model could fail or pass the rule, or the worse one would pass."""
    if scores.higher_is_better is not None and scores.higher_is_better != rule.at_least:
        better, sign = ("higher", ">=") if scores.higher_is_better else ("lower", "<=")
        return f"{better} is better here, so that {rule.text} stops the good models; write {sign}"
    if rule.against != Against.number:
        allowed = -rule.number if rule.at_least else rule.number
        return f"{rule.text} can never fail; allow less than {scale:g}" if allowed >= scale > 0 else None
    worst, best = (scores.low, scores.high) if rule.at_least else (scores.high, scores.low)
    side = 1 if rule.at_least else -1
    if worst is not None and side * (rule.number - worst) <= 0:
        return f"{rule.text} can never fail: no value is beyond {worst:g}"
    if best is not None and side * (rule.number - best) > 0:
        return f"{rule.text} can never pass: no value is beyond {best:g}"
    return None


def _require(refusal: str | None) -> None:
    if refusal is not None:
        raise _Refused(refusal)


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
