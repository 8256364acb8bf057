"""What to fix is what was planted, and nothing where there is only noise."""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftdist.core.config import compose
from sftdist.evals.advice import Advice, advise, main_metric
from sftdist.evals.intervals import Estimate
from sftdist.evals.remix import MOST_GIVEN, START, Mixture, override, propose
from sftdist.evals.report import EvalReport, ModelFacts, Scores
from sftdist.evals.slices import apart

Chance = Callable[[dict[str, Any]], float]
LAMBDAS = {"domain": 0.5, "general": 0.2, "format": 0.3}


def row(draw: random.Random, source: str, number: int, **values: Any) -> dict[str, Any]:
    """A line of rows.jsonl, as far as it is read; 5 to 400 words, up to 4 answers before, three tags."""
    words = draw.randrange(5, 400)
    return {
        "id": f"{source}/{number}",
        "source": source,
        "tags": [tag for tag in ("billing", "refund", "urgent") if draw.random() < 0.4],
        "turn": draw.randrange(5),
        "variant": None,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "word " * (words - 2)}],
        "words": words,
        **values,
    }


def evaluated(seed: int, tuned: Chance, base: Chance, n: int = 200) -> tuple[EvalReport, list[dict[str, Any]]]:
    """A report and its rows; both models are right with the chance that a row gives."""
    draw = random.Random(seed)
    rows = [row(draw, source, number) for source in LAMBDAS for number in range(n)]
    for one in rows:
        drawn = draw.random()  # one for both: what is hard is hard for both
        one["scores"] = {
            "exact_match": {"tuned": float(drawn < tuned(one)), "base": float(drawn < base(one))},
            "token_f1": {"tuned": float(draw.random() < tuned(one)), "base": float(draw.random() < base(one))},
        }
    metrics = {
        f"{source}.{name}": Scores(
            [one["id"] for one in rows if one["source"] == source],
            [one["scores"][name]["tuned"] for one in rows if one["source"] == source],
            [one["scores"][name]["base"] for one in rows if one["source"] == source],
        )
        for source in LAMBDAS
        for name in ("exact_match", "token_f1")
    }
    facts = ModelFacts("tuned", "a"), ModelFacts("base", "b")
    return EvalReport("now", "validation", *facts, decoding={}, data={}, metrics=metrics), rows


def even(_: dict[str, Any]) -> float:
    return 0.7


def advised(seed: int, tuned: Chance, base: Chance = even, **how: Any) -> Advice:
    return advise(*evaluated(seed, tuned, base, **how), LAMBDAS)


# Only noise


def test_noise_is_no_advice() -> None:
    """About 30 slices and 6 metrics a time: at 95 % each, one of them would be wrong nearly always."""
    found = [advised(seed, even, n=100) for seed in range(10)]
    assert sum(bool(one.weak or one.fell) for one in found) <= 1
    assert all(one.metrics == 6 and one.slices >= 20 for one in found)
    assert all(isinstance(one.mixture, str) for one in found)


@pytest.mark.long
def test_noise_is_no_advice_in_nineteen_of_twenty() -> None:
    found = [advised(seed, even) for seed in range(100, 200)]
    assert sum(bool(one.weak) for one in found) <= 5
    assert sum(bool(one.fell) for one in found) <= 5


# What was planted


def test_the_source_that_fell_is_named_and_gets_more() -> None:
    advice = advised(1, lambda one: 0.5 if one["source"] == "general" else 0.9)
    assert {one.metric for one in advice.fell} == {"general.exact_match", "general.token_f1"}
    assert all(one.low <= one.change <= one.high < 0 for one in advice.fell)
    assert isinstance(advice.mixture, Mixture)
    assert advice.mixture.proposed["general"] > 0.3
    assert "general fell by 0." in advice.mixture.why[0]
    lines = advice.lines()
    assert sum(line.startswith("fell  general.") for line in lines) == 2
    assert lines[-1].startswith("a mixture to try: 'data.mix={domain:0.")


def test_a_loss_that_rose_fell() -> None:
    report, rows = evaluated(2, even, even)
    losses = Scores([f"r{i}" for i in range(100)], [2.5, 2.6] * 50, [2.0, 2.2] * 50, [1.0, 9.0] * 50, False, 0.0, None)
    loops = Scores([f"r{i}" for i in range(100)], [0.0] * 60 + [1.0] * 40, [0.0] * 100, None, False)
    length = Scores([f"r{i}" for i in range(100)], [0.2] * 100, [1.0] * 100, None, None, 0.0, None)
    metrics = {**report.metrics, "general.loss": losses, "general.repetition": loops, "general.length_ratio": length}
    advice = advise(replace(report, metrics=metrics), rows, LAMBDAS)
    assert [one.metric for one in advice.fell] == ["general.loss", "general.repetition"]
    # neither is the main score of a source: no mixture follows
    assert advice.mixture == "the main score of no source fell: nothing here speaks for another mixture"
    assert advice.lines()[-1] == advice.mixture


@pytest.mark.parametrize(
    ("weak", "by", "name"),
    [
        (lambda one: one["words"] > 300, "length", "more than"),
        (lambda one: one["turn"] >= 3, "turn", "3 or more answers before"),
        (lambda one: one["turn"] == 0, "turn", "first answer"),
        (lambda one: "refund" in one["tags"], "tag", "refund"),
    ],
)
def test_the_slice_that_fails_is_the_first(weak: Callable[[dict[str, Any]], bool], by: str, name: str) -> None:
    advice = advised(3, lambda one: 0.4 if one["source"] == "format" and weak(one) else 0.9)
    first = next(one for one in advice.weak if one.by != "source")
    assert (first.source, first.by) == ("format", by)
    assert first.name.startswith(name)
    assert first.score < 0.55 < first.others
    assert first.low <= first.apart <= first.high < 0
    assert first.prompts >= 20


def test_a_source_is_held_against_those_with_the_same_score() -> None:
    advice = advised(4, lambda one: 0.5 if one["source"] == "domain" else 0.9)
    assert (advice.weak[0].source, advice.weak[0].by) == ("domain", "source")
    report, rows = evaluated(4, lambda one: 0.5 if one["source"] == "domain" else 0.9, even)
    # with another metric its figure cannot be compared with that of the others
    other = {"fields_right": rows[0]["scores"]["exact_match"]}
    renamed = [{**one, "scores": other} if one["source"] == "domain" else one for one in rows]
    metrics = {name.replace("domain.exact_match", "domain.fields_right"): one for name, one in report.metrics.items()}
    advice = advise(replace(report, metrics=metrics), renamed, LAMBDAS)
    assert not [one for one in advice.weak if one.by == "source"]


def test_a_few_prompts_are_no_slice() -> None:
    advice = advised(5, lambda one: 0.0 if "rare" in one["tags"] else 0.9)
    report, rows = evaluated(5, lambda _: 0.9, even)
    for one in rows[:15]:
        one["tags"] = ["rare"]
        one["scores"]["token_f1"]["tuned"] = 0.0
    assert not [one for one in advise(report, rows, LAMBDAS).weak if one.name == "rare"]
    assert not [one for one in advice.weak if one.name == "rare"]


def test_the_same_in_other_words_and_rows_without_a_score_are_left_out() -> None:
    report, rows = evaluated(6, even, even)
    again = [{**one, "id": f"{one['id']}~typos", "variant": "typos", "tags": ["typos"]} for one in rows]
    silent = [{**one, "id": f"{one['id']}x", "tags": ["silent"], "scores": {}} for one in rows]
    foreign = [{**one, "source": "adversarial"} for one in rows]
    advice = advise(report, [*rows, *again, *silent, *foreign], LAMBDAS)
    assert advice == advise(report, rows, LAMBDAS)


def test_damaged_scores_are_not_compared() -> None:
    report, rows = evaluated(7, lambda _: 0.2, even)
    broken = replace(report.metrics["general.exact_match"], tuned=[math.nan] * 200)
    alone = replace(report.metrics["domain.exact_match"], base=None)
    metrics = {**report.metrics, "general.exact_match": broken, "domain.exact_match": alone}
    advice = advise(replace(report, metrics=metrics), rows, LAMBDAS)
    assert advice.metrics == 4
    assert {one.metric for one in advice.fell} == set(metrics) - {"general.exact_match", "domain.exact_match"}


def test_advice_is_plain_and_short_enough_to_show() -> None:
    advice = advised(8, lambda one: 0.1 if one["words"] > 200 or one["turn"] == 2 else 0.9)
    plain = advice.to_plain()
    assert len(plain["weak"]) <= 8
    assert list(plain["weak"][0])[:4] == ["source", "by", "name", "metric"]
    assert len([line for line in advice.lines() if line.startswith("weak")]) == len(plain["weak"])
    assert advised(9, lambda _: 0.8, lambda _: 0.3).lines() == []


def test_the_main_metric_is_one_that_most_prompts_have() -> None:
    def of(n: int) -> Scores:
        return Scores([str(i) for i in range(n)], [1.0] * n)

    metrics = {"a.exact_match": of(200), "a.token_f1": of(200), "a.accuracy": of(3), "a.over_refusal": of(900)}
    assert main_metric("a", metrics) == "token_f1"
    assert main_metric("a", {**metrics, "a.accuracy": of(200)}) == "accuracy"
    assert main_metric("b", metrics) is None


def test_the_difference_of_two_figures_by_newcombe() -> None:
    """His example: 56 of 70 against 48 of 80 gives 0.0524 to 0.3339 by method 10, from Wilson's intervals."""
    one, other = Estimate(56 / 70, 0.6916, 0.8767), Estimate(48 / 80, 0.4904, 0.7004)
    found = apart(one, other)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-3)


# The mixture


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 10), min_size=1),
    st.dictionaries(st.sampled_from("abcdefg"), st.floats(0.001, 1), min_size=1),
)
def test_a_mixture_is_bounded(lambdas: dict[str, float], falls: dict[str, float]) -> None:
    found = propose(lambdas, falls)
    if isinstance(found, str):
        return
    assert math.isclose(sum(found.proposed.values()), 1.0, abs_tol=1e-9)
    assert set(found.proposed) == set(lambdas)
    for name, share in found.proposed.items():
        before = found.present[name]
        if name in falls:
            assert before - 0.01 <= share <= max(2 * before, START) + 0.01
        else:
            assert before * (1 - MOST_GIVEN) - 0.01 <= share <= before + 0.01


def test_the_proposed_mixture_by_hand() -> None:
    found = propose({"a": 2, "b": 1, "c": 1}, {"b": 0.1})
    assert isinstance(found, Mixture)
    assert found.proposed == {"a": 0.417, "b": 0.375, "c": 0.208}
    assert found.why == ["b fell by 0.100: 0.25 becomes 0.375"]
    found = propose({"a": 1, "b": 0}, {"b": 0.3})
    assert isinstance(found, Mixture)
    assert found.proposed == {"a": 0.95, "b": 0.05}
    # what all could give is not what they may
    found = propose({"a": 0.1, "b": 0.9}, {"b": 0.2})
    assert isinstance(found, Mixture)
    assert found.proposed == {"a": 0.05, "b": 0.95}


@pytest.mark.parametrize(
    ("lambdas", "falls", "words"),
    [
        ({"a": 1.0}, {}, "no source fell"),
        ({"a": 1.0}, {"safety": 0.5}, "no source fell"),
        ({"a": 1.0, "b": 1.0}, {"a": 0.1, "b": 0.1}, "every source fell"),
        ({"a": 1.0}, {"a": 0.1}, "every source fell"),
        ({}, {"a": 0.1}, "no source fell"),
        ({"a": 0.0}, {"a": 0.1}, "no source fell"),
    ],
)
def test_there_is_not_always_a_mixture_to_propose(
    lambdas: dict[str, float], falls: dict[str, float], words: str
) -> None:
    found = propose(lambdas, falls)
    assert isinstance(found, str)
    assert words in found


def test_the_override_can_be_pasted() -> None:
    proposed = {"domain": 0.417, "general": 0.375, "format": 0.208}
    (word,) = shlex.split(override(proposed))
    cfg = compose("quickstart", [word])
    assert {name: source.lam for name, source in cfg.data.sources.items()} == proposed
