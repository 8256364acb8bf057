"""The gate lets a model leave for its figures alone: every way around it that we could think of is tried here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftdist.core.config import compose
from sftdist.core.errors import ConfigError, GateError
from sftdist.core.rules import BROUGHT_ALONG
from sftdist.core.storage import sha256_json
from sftdist.evals.lineup import metric_names
from sftdist.evals.probes.robustness import KINDS
from sftdist.evals.report import EvalReport, ModelFacts, Scores
from sftdist.release.gate import Decision, Outcome, Verdict, decide
from sftdist.release.rule import misspelt, read_rules
from tests.conftest import ROOT

TUNED, BASE, LAST = "a" * 64, "b" * 64, "d" * 64
GATES = sorted((ROOT / "conf/gate").glob("*.yaml"))


def share(right: int, n: int) -> list[float]:
    """`right` ones, then zeros."""
    return [1.0] * right + [0.0] * (n - right)


def scores(tuned: list[float], base: list[float] | None = None, **values: Any) -> Scores:
    return Scores([f"general/{index}" for index in range(len(tuned))], tuned, base, **values)


def report(**metrics: Scores) -> EvalReport:
    """A report on `general.<metric>`; every prompt of it is known word for word."""
    ids = {id for one in metrics.values() for id in one.ids}
    return EvalReport(
        created="2026-01-01T00:00:00+00:00",
        split="holdout",
        tuned=ModelFacts("tuned", TUNED),
        base=ModelFacts("base", BASE),
        decoding={"engine": "hf", "dtype": "fp32", "max_new_tokens": 64, "greedy": True, "batch_size": 4},
        data={},
        metrics={f"general.{name}": one for name, one in metrics.items()},
        asked={id: sha256_json(id) for id in ids},
    )


def released(found: EvalReport) -> EvalReport:
    """The report of the last release."""
    return replace(found, tuned=ModelFacts("last", LAST))


def decided(rules: Sequence[Any], found: EvalReport, *, min_prompts: int = 50, **how: Any) -> Decision:
    read, issues = read_rules(rules, min_prompts=min_prompts, confidence=0.95)
    assert issues == []
    return decide(read, found, **{"model_sha256": TUNED, **how})


def only(rule: Any, found: EvalReport, **how: Any) -> Verdict:
    """The one verdict of one rule, which decides the whole."""
    decision = decided([rule], found, **how)
    (verdict,) = decision.verdicts
    assert decision.passed == (verdict.outcome == Outcome.passed)
    return verdict


GOOD = report(exact_match=scores(share(196, 200), share(100, 200)))


# What passes


@pytest.mark.parametrize(
    "rule",
    [
        "general.exact_match >= 0.95",
        "general.exact_match>=.95",
        "  general.exact_match  >=  9.5e-1 ",
        "general.exact_match >= base",
        "general.exact_match >= base + 0",
        "general.exact_match >= base - 0.02",
        "general.exact_match >= base-0.02",
        "*.exact_match >= base + 0.4",
        {"rule": "general.exact_match >= base + 0.3", "proven": True},
        {"rule": "general.exact_match >= 0.94", "proven": True},
        {"rule": "general.exact_match >= 0.9", "confidence": 0.99, "min_prompts": 200, "doubt": 0},
    ],
)
def test_a_good_model_passes(rule: Any) -> None:
    assert only(rule, GOOD).outcome == Outcome.passed


def test_a_verdict_has_the_figures_it_was_made_of() -> None:
    verdict = only("general.exact_match >= base - 0.02", GOOD)
    assert (verdict.prompts, verdict.tuned, verdict.other, verdict.threshold) == (200, 0.98, 0.5, -0.02)
    assert verdict.value == pytest.approx(0.48)
    assert verdict.low is not None
    assert verdict.high is not None
    assert 0.4 < verdict.low < 0.48 < verdict.high < 0.56
    assert verdict.words.startswith("+0.480 [+0.4")
    assert "200 prompts" in verdict.words


def test_a_decision_is_read_as_it_was_written(tmp_path: Path) -> None:
    decision = decided(["general.exact_match >= 0.95", "*.exact_mtch >= base", "*.exact_match >= last"], GOOD)
    assert Decision.read(decision.write(tmp_path)) == decision
    assert (decision.model, decision.base, decision.report) == (TUNED, BASE, GOOD.sha256)


def test_no_decision_is_read_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="run sftdist publish again"):
        Decision.read(tmp_path / "decision.json")
    (tmp_path / "decision.json").write_text('{"passed": true}')
    with pytest.raises(GateError, match="given no decision of format 1"):
        Decision.read(tmp_path / "decision.json")


# What fails


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("general.exact_match >= 0.99", "required at least 0.99"),
        ("general.exact_match >= base + 0.6", "worse than +0.6 allows"),
        ({"rule": "general.exact_match >= 0.99", "doubt": 0.2}, "required at least 0.99"),
    ],
)
def test_a_model_below_the_threshold_fails(rule: Any, words: str) -> None:
    verdict = only(rule, GOOD)
    assert verdict.outcome == Outcome.failed
    assert words in verdict.words


def test_what_is_better_when_lower_fails_when_it_is_higher() -> None:
    loops = report(repetition=scores(share(60, 200), share(10, 200), higher_is_better=False))
    assert only("general.repetition <= 0.05", loops).outcome == Outcome.failed
    assert only("general.repetition <= base + 0.1", loops).outcome == Outcome.failed
    assert only("general.repetition <= base + 0.3", loops).outcome == Outcome.passed


def test_a_drop_counts_only_where_the_interval_says_so() -> None:
    """The same fall of five points: of 40 prompts in 800 beyond any doubt, of 5 against 3 in 40 pure chance."""
    certain = report(exact_match=scores(share(680, 800), share(720, 800)))
    assert only("general.exact_match >= base - 0.02", certain).outcome == Outcome.failed
    base, tuned = share(190, 200), [0.0] * 6 + share(188, 194)
    noise = report(exact_match=scores(tuned, base))
    verdict = only("general.exact_match >= base", noise)
    assert verdict.outcome == Outcome.passed
    assert verdict.value == pytest.approx(-0.01)
    proven = only({"rule": "general.exact_match >= base", "proven": True}, noise)
    assert proven.outcome == Outcome.refused


# Too little to decide


def test_five_prompts_decide_nothing_however_right_they_are() -> None:
    five = report(exact_match=scores(share(5, 5), share(0, 5)))
    assert "5 prompts decide nothing; required 50" in only("general.exact_match >= 0.8", five).words
    assert "required 50" in only("general.exact_match >= base", five).words
    # nor where the configuration says that one is enough: the interval knows
    verdict = only({"rule": "general.exact_match >= 0.8", "min_prompts": 1, "doubt": 0.2}, five)
    assert verdict.outcome == Outcome.refused
    assert "cannot be ruled out; required about" in verdict.words
    kept = report(exact_match=scores(share(5, 5), share(5, 5)))
    assert only({"rule": "general.exact_match >= base - 0.02", "min_prompts": 1}, kept).outcome == Outcome.refused


def test_a_fall_that_few_prompts_cannot_show_is_no_pass() -> None:
    """Ten points lost on 60 prompts: the interval holds 0, and a fall of 20 points as well."""
    tuned, base = share(42, 60), [0.0] * 12 + share(48, 48)
    verdict = only("general.exact_match >= base - 0.02", report(exact_match=scores(tuned, base)))
    assert verdict.outcome == Outcome.refused
    assert verdict.high is not None
    assert verdict.high > -0.02
    assert "no number of prompts would do" in verdict.words or "required about" in verdict.words


def test_prompts_that_weigh_nothing_do_not_count() -> None:
    """One prompt of 100 has nearly all the weight, and the model is right there."""
    heavy = scores(share(1, 100), share(0, 100), weights=[1e6] + [1.0] * 99)
    verdict = only("general.exact_match >= 0.9", report(exact_match=heavy))
    assert verdict.outcome == Outcome.refused
    assert "100 prompts, by their weights as good as 1, decide nothing" in verdict.words


def test_one_prompt_many_times_is_one_prompt() -> None:
    same = Scores(["general/0"] * 200, share(200, 200), share(0, 200))
    verdict = only("general.exact_match >= 0.9", report(exact_match=same))
    assert verdict.outcome == Outcome.refused
    assert "199 prompts twice" in verdict.words


def test_one_value_for_all_is_not_certain() -> None:
    assert only("general.exact_match >= 0.98", report(exact_match=scores([1.0] * 60))).low == pytest.approx(
        0.94, abs=0.01
    )
    alike = report(exact_match=scores([1.0] * 60, [1.0] * 60))
    proven = {"rule": "general.exact_match >= base", "proven": True}
    assert only(proven, alike).outcome == Outcome.refused
    loss = report(loss=scores([2.0] * 60, [2.1] * 60, higher_is_better=False, high=None))
    verdict = only("general.loss <= base", loss)
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.low < -0.1 < 0 < verdict.high


# Damaged figures


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"tuned": [math.nan, *share(59, 59)]},
            "the tuned model: given 1 of 60 values that are no number, such as nan",
        ),
        ({"base": [math.inf, *share(59, 59)]}, "the base model: given 1 of 60 values that are no number, such as inf"),
        ({"tuned": [None, *share(59, 59)]}, "no number, such as None"),
        ({"tuned": [True] * 60}, "no number, such as True"),
        ({"tuned": ["1"] * 60}, "no number, such as '1'"),
        ({"tuned": [60.0, *share(0, 59)]}, "given 60, required values of 0 to 1"),
        ({"base": [-60.0, *share(0, 59)]}, "given -60, required values of 0 to 1"),
        ({"base": share(0, 59)}, "given 59 values for 60 prompts"),
        ({"tuned": share(61, 61)}, "given 61 values for 60 prompts"),
        ({"weights": [1.0] * 59}, "one number of at least 0 per prompt"),
        ({"weights": [-1.0] + [1.0] * 59}, "one number of at least 0 per prompt"),
        ({"weights": [math.nan] * 60}, "one number of at least 0 per prompt"),
        ({"weights": [0.0] * 60}, "given 0 for every prompt"),
    ],
)
@pytest.mark.parametrize("rule", ["general.exact_match >= 0.5", "general.exact_match >= base - 0.02"])
def test_damaged_scores_are_refused(rule: str, wrong: dict[str, Any], words: str) -> None:
    verdict = only(rule, report(exact_match=replace(scores(share(60, 60), share(0, 60)), **wrong)))
    assert verdict.outcome == Outcome.refused
    assert words in verdict.words


def test_a_metric_without_data_is_refused() -> None:
    assert "given no prompt" in only("general.exact_match >= 0.5", report(exact_match=scores([], []))).words


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("general.exact_mach", "did you mean general.exact_match?"),
        ("generl.exact_match", "did you mean general.exact_match?"),
        ("*.exact_mach", "did you mean general.exact_match?"),
        ("exact_match", "did you mean general.exact_match?"),
        ("something.else", "nothing of something was measured, only of general"),
        ("general.*.exact_match", "did you mean general.exact_match?"),
        ("format.schema_valid", "nothing of format was measured, only of general; choose a gate that names no source"),
        ("format.exact_match", "did you mean general.exact_match? Or choose a gate that names no source"),
        ("general.chrf", "no metric of this name was measured; measured are general.exact_match"),
    ],
)
def test_a_metric_that_is_not_there_is_refused(metric: str, words: str) -> None:
    verdict = only(f"{metric} >= 0.5", GOOD)
    assert verdict.outcome == Outcome.refused
    assert words in verdict.words


def test_dots_of_a_metric_are_dots() -> None:
    assert only("generalxexact_match >= 0.5", GOOD).outcome == Outcome.refused


# Another model, no base, no earlier release


def test_a_report_of_another_model_decides_nothing() -> None:
    for hash in ("c" * 64, ""):
        decision = decided(["general.exact_match >= 0.5"], GOOD, model_sha256=hash)
        assert not decision.passed
        assert decision.verdicts == []
        assert "report: given one of model aaaaaaaaaaaa" in decision.reasons[0]
    nameless = replace(GOOD, tuned=ModelFacts("tuned", ""))
    assert not decided(["general.exact_match >= 0.5"], nameless, model_sha256="").passed


def test_a_comparison_with_another_base_decides_nothing() -> None:
    weak = decided(["general.exact_match >= base"], GOOD, base_sha256="c" * 64)
    assert not weak.passed
    assert "report: given a comparison with base bbbbbbbbbbbb" in weak.reasons[0]
    none = decided(["general.exact_match >= 0.5"], replace(GOOD, base=None), base_sha256=BASE)
    assert not none.passed
    assert "with no base model" in none.reasons[0]
    assert decided(["general.exact_match >= base"], GOOD, base_sha256=BASE).passed


def test_a_report_on_another_split_decides_nothing() -> None:
    decision = decided(["general.exact_match >= 0.5"], replace(GOOD, split="validation"), split="holdout")
    assert not decision.passed
    assert "given one of the validation split" in decision.reasons[0]


def test_a_rule_on_base_needs_a_base() -> None:
    for found in (report(exact_match=scores(share(196, 200))), replace(GOOD, base=None)):
        verdict = only("general.exact_match >= base - 0.02", found)
        assert verdict.outcome == Outcome.refused
        assert "the base model was not asked" in verdict.words


def test_the_base_model_is_not_as_good_as_itself() -> None:
    itself = replace(report(exact_match=scores(share(100, 200), share(100, 200))), tuned=ModelFacts("base", BASE))
    verdict = only("general.exact_match >= base - 0.02", itself, model_sha256=BASE)
    assert verdict.outcome == Outcome.refused
    assert "this is the base model itself" in verdict.words


def test_a_first_release_has_nothing_to_be_compared_with() -> None:
    decision = decided(["general.exact_match >= 0.9", "general.exact_match >= last - 0.02"], GOOD)
    assert decision.passed
    assert [one.outcome for one in decision.verdicts] == [Outcome.passed, Outcome.skipped]
    assert "there is no earlier release" in decision.verdicts[1].words


def test_rules_that_decide_nothing_let_nothing_through() -> None:
    nothing: list[list[Any]] = [
        [],
        ["general.exact_match >= last - 0.02"],
        [{"rule": "*.schema_valid >= 0.9", "optional": True}],
        [{"rule": "*.schema_valid >= 0.9", "optional": True}, "general.exact_match >= last"],
    ]
    for rules in nothing:
        decision = decided(rules, GOOD)
        assert not decision.passed
        assert decision.reasons
        assert decision.reasons[0].startswith("gate.rules: ")


def test_the_last_release_is_compared_on_the_same_prompts() -> None:
    last = released(report(exact_match=scores(share(199, 200))))
    assert only("general.exact_match >= last - 0.02", GOOD, last=last).outcome == Outcome.passed
    better = report(exact_match=scores(share(100, 200)))
    verdict = only("general.exact_match >= last - 0.02", better, last=last)
    assert verdict.outcome == Outcome.failed
    assert verdict.other == 0.995
    # only those that both were asked: here the last 100 of 200, of which this model has every one
    some = replace(last, asked={id: sha for id, sha in last.asked.items() if int(id.split("/")[1]) >= 96})
    verdict = only("general.exact_match >= last - 0.02", GOOD, last=some)
    assert (verdict.prompts, verdict.other) == (104, pytest.approx(103 / 104))


def _renamed(found: EvalReport) -> EvalReport:
    one = found.metrics["general.exact_match"]
    return replace(found, metrics={"general.exact_match": replace(one, ids=[f"other/{id}" for id in one.ids])})


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (_renamed(GOOD), "none of these 200 prompts was asked of the last release"),
        # the same ids, which may be line numbers, and other words in them
        (replace(GOOD, asked={id: sha256_json([id]) for id in GOOD.asked}), "none of these 200 prompts"),
        (replace(GOOD, asked={}), "none of these 200 prompts"),
        (replace(GOOD, asked=dict(list(GOOD.asked.items())[:30])), "30 prompts decide nothing; required 50"),
        (replace(GOOD, metrics={}), "the last release was not measured so"),
        (report(exact_match=scores([math.nan] * 200)), "no number, such as nan"),
        (report(exact_match=scores(share(2, 200), high=2.0)), "meant something else"),
        (replace(GOOD, decoding={**GOOD.decoding, "max_new_tokens": 4}), "answered with max_new_tokens=4"),
        (replace(GOOD, decoding={**GOOD.decoding, "dtype": "bf16"}), "answered with dtype=bf16"),
    ],
)
def test_a_release_that_cannot_be_compared_is_no_pass(last: EvalReport, words: str) -> None:
    verdict = only("general.exact_match >= last - 0.02", GOOD, last=released(last))
    assert verdict.outcome == Outcome.refused
    assert words in verdict.words


def test_neither_report_without_digests_is_taken_on_trust() -> None:
    blind = replace(GOOD, asked={})
    assert only("general.exact_match >= last", blind, last=released(blind)).outcome == Outcome.refused


def test_the_size_of_batches_does_not_part_two_releases() -> None:
    last = released(replace(GOOD, decoding={**GOOD.decoding, "batch_size": 64}))
    assert only("general.exact_match >= last", GOOD, last=last).outcome == Outcome.passed


def test_a_release_is_not_held_against_itself() -> None:
    decision = decided(["general.exact_match >= 0.9", "general.exact_match >= last"], GOOD, last=GOOD)
    assert decision.passed
    assert decision.verdicts[1].words == "this is the last release itself, byte by byte"
    assert not decided(["general.exact_match >= last"], GOOD, last=GOOD).passed


# Rules that say nothing


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("general.exact_match >= 0", "can never fail"),
        ("general.exact_match >= -1", "can never fail"),
        ("general.exact_match >= base - 1", "can never fail"),
        ("general.exact_match >= 98", "can never pass: no value is beyond 1"),
        ("general.exact_match <= 0.99", "higher is better here, so that general.exact_match <= 0.99 stops the good"),
        ("general.exact_match <= base + 0.5", "write >="),
    ],
)
def test_a_rule_that_no_model_can_fail_is_refused(rule: str, words: str) -> None:
    verdict = only(rule, GOOD)
    assert verdict.outcome == Outcome.refused
    assert words in verdict.words


def test_a_rule_on_a_loss_cannot_allow_anything() -> None:
    found = report(loss=scores([2.0, 2.1] * 50, [2.2, 2.3] * 50, higher_is_better=False, high=None))
    assert only("general.loss <= base", found).outcome == Outcome.passed
    assert only("general.loss <= 2.5", found).outcome == Outcome.passed
    assert only("general.loss <= 2.0", found).outcome == Outcome.failed
    assert "can never fail" in only("general.loss <= base + 5", found).words
    assert "lower is better here" in only("general.loss >= base - 0.1", found).words
    assert "can never pass" in only("general.loss <= -1", found).words


def test_what_only_describes_may_be_held_from_both_sides() -> None:
    lengths = report(length_ratio=scores([0.9, 1.1] * 50, higher_is_better=None, high=None))
    assert only("general.length_ratio <= 1.5", lengths).outcome == Outcome.passed
    assert only("general.length_ratio >= 0.5", lengths).outcome == Outcome.passed
    assert only("general.length_ratio >= 1.5", lengths).outcome == Outcome.failed


def test_a_star_is_every_source_and_none_of_the_prompts_brought_along() -> None:
    one = scores(share(196, 200), share(100, 200))
    names = ("general.exact_match", "a.b.exact_match", "adversarial.exact_match", "all.exact_match", "general.rouge_l")
    found = replace(GOOD, metrics=dict.fromkeys(names, one))
    decision = decided(["*.exact_match >= 0.9"], found)
    assert [verdict.metric for verdict in decision.verdicts] == ["a.b.exact_match", "general.exact_match"]
    assert [one.metric for one in decided(["a*.exact_match >= 0.9"], found).verdicts] == sorted(names[1:4])
    # one source that fails is enough
    found.metrics["z.exact_match"] = scores(share(100, 200), share(100, 200))
    decision = decided(["*.exact_match >= 0.9"], found)
    assert not decision.passed
    assert decision.lines()[1].split()[:2] == ["failed", "z.exact_match"]


def test_one_failure_among_many_passes_stops_the_model() -> None:
    rules = ["general.exact_match >= 0.9", "general.exact_match >= base", "general.exact_match >= 0.999"]
    decision = decided(rules, GOOD)
    assert [one.outcome for one in decision.verdicts] == [Outcome.passed, Outcome.passed, Outcome.failed]
    assert not decision.passed
    assert decision.lines()[0] == "gate: not passed"


# Rules that cannot be read


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("general.exact_match > 0.9", "required METRIC >= NUMBER"),
        ("general.exact_match = 0.9", "required METRIC >= NUMBER"),
        ("general.exact_match >= 98%", "required METRIC >= NUMBER"),
        ("general.exact_match >= bse - 0.1", "required METRIC >= NUMBER"),
        ("general.exact_match >= base * 0.9", "required METRIC >= NUMBER"),
        ("general.exact_match >= base - nan", "required METRIC >= NUMBER"),
        ("general.exact_match >= nan", "required METRIC >= NUMBER"),
        ("general.exact_match >= inf", "required METRIC >= NUMBER"),
        ("general.exact_match >= 1e999", "required a finite number"),
        ("general.exact_match >= base - 1e999", "required a finite number"),
        ("general.exact_match >= 0.9 or true", "required METRIC >= NUMBER"),
        ("general.exact_match", "required METRIC >= NUMBER"),
        (">= 0.9", "required METRIC >= NUMBER"),
        ("", "required METRIC >= NUMBER"),
        (None, "given null, required METRIC >= NUMBER"),
        (0.9, "required METRIC >= NUMBER"),
        ({}, "given null, required METRIC >= NUMBER"),
        ({"general.exact_match": 0.9}, "general.exact_match: unknown key"),
        ({"rule": "a.b >= 0.9", "provn": True}, "provn: unknown key; did you mean proven?"),
        ({"rule": "a.b >= 0.9", "proven": "yes"}, "proven: given 'yes', required true or false"),
        ({"rule": "a.b >= 0.9", "optional": 1}, "optional: given 1, required true or false"),
        ({"rule": "a.b >= 0.9", "confidence": 0.5}, "confidence: given 0.5, required a number of 0.8 to 0.999"),
        ({"rule": "a.b >= 0.9", "confidence": 95}, "confidence: given 95, required a number of 0.8 to 0.999"),
        ({"rule": "a.b >= base", "confidence": 0.9999999}, "required a number of 0.8 to 0.999"),
        ({"rule": "a.b >= base", "confidence": math.nan}, "required a number of 0.8 to 0.999"),
        ({"rule": "a.b >= base", "doubt": 1.0}, "doubt: given 1.0, required a number of 0 to 0.2"),
        ({"rule": "a.b >= base", "doubt": -1}, "doubt: given -1, required a number of 0 to 0.2"),
        ({"rule": "a.b >= base", "doubt": 0.1, "proven": True}, "keep one of the two"),
        ({"rule": "a.b >= base", "min_prompts": 0}, "min_prompts: given 0, required a whole number of at least 1"),
        ({"rule": "a.b >= base", "min_prompts": True}, "min_prompts: given true, required a whole number"),
        ({"rule": "a.b >= base", "min_prompts": 2.5}, "min_prompts: given 2.5, required a whole number"),
    ],
)
def test_a_rule_that_cannot_be_read_is_an_issue_of_the_configuration(rule: Any, words: str) -> None:
    read, issues = read_rules(["a.b >= 0.5", rule], min_prompts=50, confidence=0.95)
    assert len(read) == 1
    assert issues
    assert all(issue.startswith("gate.rules[1]: ") for issue in issues)
    assert words in issues[0]


def test_the_gates_own_confidence_is_held_to_the_same_bounds() -> None:
    rules, issues = read_rules(["a.b >= 0.5", "a.c >= 0.5"], min_prompts=50, confidence=0.5)
    assert (rules, issues) == ([], ["gate.confidence: given 0.5, required a number of 0.8 to 0.999"])


# The shipped gates


@pytest.mark.parametrize("path", GATES, ids=lambda path: path.stem)
def test_a_shipped_gate_can_be_read(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert set(values) <= {"rules", "min_prompts"}
    rules, issues = read_rules(values["rules"], min_prompts=values.get("min_prompts", 50), confidence=0.95)
    assert issues == []
    assert len(rules) == len({rule.text for rule in rules}) >= 5


@pytest.mark.parametrize("path", GATES, ids=lambda path: path.stem)
def test_a_shipped_gate_asks_for_metrics_that_there_are(path: Path) -> None:
    known = metric_names([])
    rules, _ = read_rules(yaml.safe_load(path.read_text())["rules"], min_prompts=50, confidence=0.95)
    for rule in rules:
        of, _, name = rule.metric.rpartition(".")
        assert name in (KINDS if of == "robustness" else known), rule.text
        assert of in (*BROUGHT_ALONG, "*", *(("domain", "general", "format") if path.stem == "quickstart" else ()))


def test_a_source_of_which_nothing_was_measured_is_not_passed_over() -> None:
    """Else a rule on every source passes where the very source that is forgotten has no held-out row."""
    found = replace(GOOD, data={"sources": {"general": "key", "rare": "key"}})
    decision = decided(["*.exact_match >= base"], found)
    assert not decision.passed
    assert [(one.metric, one.outcome) for one in decision.verdicts] == [
        ("general.exact_match", Outcome.passed),
        ("rare.*", Outcome.refused),
    ]
    assert "no row of it is in the holdout split" in decision.verdicts[1].words
    assert decided(["general.exact_match >= base"], found).passed, "a rule on one source is about that"
    other = replace(found, metrics={**found.metrics, "rare.token_f1": scores(share(40, 80), share(40, 80))})
    assert decided(["*.exact_match >= base"], other).passed, "it has other metrics"


@pytest.mark.parametrize(
    ("rule", "meant"),
    [
        ("format.schema_vaild >= 0.9", "did you mean format.schema_valid?"),
        ("*.instructions_strct >= base", "did you mean *.instructions_strict?"),
        ("robustness.typso >= -0.1", "did you mean robustness.typos?"),
        ("safety.safe >= 0.1", "required one of"),
    ],
)
def test_an_optional_rule_that_nothing_measures_is_no_rule(rule: str, meant: str) -> None:
    rules, _ = read_rules([{"rule": rule, "optional": True}, rule], min_prompts=50, confidence=0.95)
    (found,) = misspelt(rules, metric_names([]))
    assert found.startswith(f"gate.rules: {rule}: given the metric ")
    assert meant in found


def test_what_can_be_measured_may_be_optional() -> None:
    texts = [
        "benchmarks.gsm8k.exact_match.strict-match >= 0.1",
        "*.s*_valid >= 0.9",
        "safety.judge_score >= 0.5",
        "* >= 0",
    ]
    rules, _ = read_rules([{"rule": text, "optional": True} for text in texts], min_prompts=50, confidence=0.95)
    assert misspelt(rules, metric_names([])) == []


def test_sources_cannot_hide_behind_the_names_of_the_evaluation() -> None:
    for name in ("all", "adversarial", "safety.mine"):
        with pytest.raises(ConfigError, match="which the evaluation uses for its own"):
            compose("full", ["model.path=m", f"data.sources={{{name}:{{path:a.jsonl}}}}"])
