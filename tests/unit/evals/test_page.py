"""The page of an evaluation: what a person who decides must find on it, and what must not be in it."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.runfacts import Mixed
from sftdist.evals import page_charts
from sftdist.evals.advice import Advice
from sftdist.evals.intervals import Estimate
from sftdist.evals.page import page, write_page
from sftdist.evals.page_charts import Axis, Line, axis_of, interval_chart, line_chart, nice, thinned
from sftdist.evals.page_examples import MOST_WORDS, chosen, compared, regressions, worst_answers
from sftdist.evals.report import Scores
from tests.evaluations import RULES, SOURCES, decision_of, everything, figures_of, report, row, rows, run
from tests.pages import foreign_parts
from tests.reports import EVIL


def shown(text: str = "", **changes: Any) -> str:
    """The page of everything, as text."""
    given = {**everything(text), **changes}
    return page(given.pop("report"), given.pop("rows"), given.pop("figures"), **given)


def words(html: str) -> str:
    """What a page says, without its elements and styles."""
    bare = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", bare)).split())


def top(html: str) -> str:
    return words(html.partition("</header>")[0])


def test_nothing_from_data_becomes_an_element_and_nothing_is_loaded() -> None:
    html = shown(EVIL)
    assert foreign_parts(html) == []
    assert html.count("<script") == 0
    assert words(html).count("x()") > 30  # it was there to be escaped, in every place


def test_every_figure_is_on_the_page() -> None:
    given = everything("")
    said = words(shown())
    for name, one in given["figures"].items():
        assert one.base is not None
        assert one.change is not None
        for figure in (f"{one.tuned.value:.3f}", f"{one.base.value:.3f}", f"{one.change.low:+.3f}"):
            assert figure in said, (name, figure)
    for text in ("damaged", "given 3, required values of 0 to 1"):
        assert text in said
    for text in ("0.300", "0.200", "1.20", "123,456 tokens", "1,500", "CC0", "looks 3", "fp32", "a" * 64, "2.13.0"):
        assert text in said, text


@pytest.mark.parametrize(
    ("rules", "title", "says"),
    [
        (RULES[:1], "Not passed", "1 rule is broken"),
        (("domain.exact_match >= base + 0.1",), "Passed", "no rule of the gate stops it"),
        (("domain.nothing >= 0.5",), "Not decided", "the gate cannot decide"),
        ((), "Not decided", "gate.rules: given none"),
    ],
)
def test_the_gate_is_said_first(rules: tuple[str, ...], title: str, says: str) -> None:
    head = top(shown(decision=decision_of(report(rows(40)), rules)))
    assert re.search(rf"^(?:Evaluation of r )+. {title} Split validation", head), head[:200]
    assert says in head
    assert all(rule in head for rule in rules)


def test_without_a_gate_the_page_says_that_nothing_was_decided() -> None:
    assert "No rule was set" in top(shown(decision=None))


def test_a_rule_that_stops_the_model_stands_before_one_that_does_not() -> None:
    head = top(shown())
    assert head.index("general.exact_match >= base - 0.02") < head.index("domain.exact_match >= base + 0.1")
    assert head.index("format.exact_match >= 0.97 failed") < head.index("general.exact_match >= base - 0.02 refused")


def test_the_metrics_that_fell_are_named_before_those_that_rose() -> None:
    head = top(shown())
    assert "5 metrics better, 1 worse, 1 without a clear change" in head
    assert head.index("general.rouge_l 0.812 → 0.650") < head.index("domain.exact_match 0.125 → 0.875")
    assert head.index("all.loss 2.744 → 1.372") > head.index("▼")  # lower is better: it rose in worth


def test_the_preview_says_that_it_is_one() -> None:
    assert "preview on the validation split" in top(shown())
    assert "preview" not in top(shown(report=replace(report(rows(40)), split="holdout")))


def test_without_base_run_advice_and_rows() -> None:
    found = [{**one, "base": None, "scores": {}} for one in rows(3)]
    given = replace(report(rows(40)), base=None)
    alone = replace(given, metrics={name: replace(scores, base=None) for name, scores in given.metrics.items()})
    html = page(alone, found, figures_of(alone))
    assert foreign_parts(html) == []
    assert "no base model to compare with" in words(html)
    assert "Where the tuned model is worse" not in words(html)


def test_a_run_that_has_not_begun() -> None:
    bare = replace(run(), curves={}, mixture=(Mixed("domain", None, None, None),), data={}, planned=None)
    assert foreign_parts(shown(run=bare)) == []


def test_5_000_long_rows_are_a_small_page_that_says_what_it_left_out(tmp_path: Path) -> None:
    long = [{**one, "base": "yes " * 5000, "tuned": "no " * 5000, "reference": "x" * 90_000} for one in rows(1667)]
    prompt = [{"role": "user", "content": "why " * 5000}] * 40
    many = {f"s{n}.m{m}": Scores(["a"], [1.0], [0.0]) for n in range(50) for m in range(20)}
    given = everything("")
    full = replace(
        given["report"],
        metrics={**given["report"].metrics, **many},
        data={"left_out": {f"p{n}": "why " * 900 for n in range(5000)}},
    )
    found = [{**one, "prompt": prompt} for one in long]
    file = write_page(full, found, figures_of(full, 100), tmp_path, decision=given["decision"], run=run(steps=20_000))
    said = words(file.read_text(encoding="utf-8"))
    assert file.stat().st_size < 2_500_000
    assert "20 are shown" in said
    assert "rows.jsonl" in said
    assert "36 messages left out" in said
    assert "more characters" in said
    assert f"and {len(full.metrics) - 300} more in report.json" in said
    assert "4,990 more in report.json" in said


def test_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    given = everything("\ud800")
    file = write_page(given["report"], given["rows"], given["figures"], tmp_path, run=given["run"])
    assert "answer to question" in file.read_text(encoding="utf-8")


def test_what_to_fix() -> None:
    said = words(shown())
    assert "general.rouge_l by 0.162, interval -0.300 to -0.010, 40 prompts" in said
    assert said.count("general.rouge_l tag: short 20 0.300 0.600 -") == 8  # of 30 slices
    assert "data.mix={general:0.5}" in said
    nothing = words(shown(advice=Advice([], [], "the main score of no source fell", 12, 34)))
    assert "Nothing fell against the base beyond what chance does to 12 metrics" in nothing
    assert "the main score of no source fell" in nothing


def test_a_look_at_the_holdout_is_said_at_the_top() -> None:
    assert "It is look 3 at the holdout" in top(shown(report=replace(report(rows(40)), split="holdout")))


def test_how_many_changes_are_chance_is_said() -> None:
    found = {f"s.m{n}": Scores(["a", "b"], [1.0, 0.0], [0.0, 1.0]) for n in range(100)}
    given = replace(report(rows(5)), metrics=found)
    assert "about 5 would seem to have changed by chance alone" in top(page(given, [], figures_of(given, 100)))
    assert "by chance" not in top(shown())


# --- which prompts are shown --------------------------------------------------------------------------


def of_rows(found: list[dict[str, Any]], **changes: Any) -> dict[str, Scores]:
    return {name: replace(scores, **changes) for name, scores in report(found).metrics.items()}


def test_the_worst_first_and_only_those_that_fell() -> None:
    found = [row("a", 1, 1.0, 1.0), row("a", 2, 0.0, 0.0), row("a", 3, 1.0, 0.0), row("a", 4, 0.0, 1.0)]
    fallen = regressions(found, of_rows(found))
    assert [one.row["id"] for one in fallen] == ["a/3", "a/1", "a/2"]  # 1 and 2 lose 0.1 of rouge_l
    assert [(fall.metric, fall.size) for fall in fallen[0].falls] == [("exact_match", 1.0), ("rouge_l", 0.6)]


def test_where_lower_is_better_a_rise_is_a_fall() -> None:
    found = [row("a", 1, 1.0, 0.0), row("a", 2, 0.0, 1.0)]
    lower = {"a.exact_match": replace(of_rows(found)["a.exact_match"], higher_is_better=False)}
    assert [one.row["id"] for one in regressions(found, lower)] == ["a/2"]


def test_what_cannot_be_better_or_worse_is_no_fall() -> None:
    found = [row("a", 1, 1.0, 0.0)]
    assert regressions(found, of_rows(found, higher_is_better=None)) == []


def test_falls_are_measured_in_what_a_metric_spans() -> None:
    found = [row("a", n, 0.0, 0.0) for n in range(3)]
    for one, (base, tuned) in zip(found, ((100.0, 90.0), (0.0, 0.0), (50.0, 100.0)), strict=True):
        one["scores"] = {"chars": {"base": base, "tuned": tuned}}
    scores = {"a.chars": Scores([], [90.0, 0.0, 100.0], [100.0, 0.0, 50.0], high=None)}
    assert [(one.row["id"], one.falls[0].size) for one in regressions(found, scores)] == [("a/0", 0.1)]


def test_a_prompt_in_other_words_and_a_score_of_one_model_alone_are_no_fall() -> None:
    found = [{**row("a", 1, 1.0, 0.0), "variant_of": "a/0"}, row("a", 2, 1.0, 0.0)]
    found[1]["scores"] = {"exact_match": {"base": None, "tuned": 0.0}}
    assert regressions(found, of_rows([row("a", 1, 1.0, 0.0)])) == []


def test_no_source_hides_another() -> None:
    found = [row("loud", n, 1.0, 0.0) for n in range(50)] + [row("quiet", n, 1.0, 1.0) for n in range(5)]
    picked = [one.row["id"] for one in chosen(regressions(found, of_rows(found)), 10)]
    assert picked == [f"loud/{n}" for n in (0, 1, 10, 11, 12, 13, 14, 15)] + ["quiet/0", "quiet/1"]


def test_the_answers_that_cost_a_rule() -> None:
    found = [row("a", 1, 1.0, 0.0), row("a", 2, 0.0, 1.0), row("b", 3, 1.0, 0.0), row("a", 4, 0.0, 0.5)]
    metrics = of_rows(found)
    assert [one.row["id"] for one in worst_answers(found, "a.exact_match", metrics["a.exact_match"])] == ["a/1", "a/4"]
    assert worst_answers(found, "a.length_ratio", metrics["a.length_ratio"]) == []
    assert "Answers that cost a rule" in words(shown())


# --- differences --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "tuned", "struck", "new"),
    [
        ("the red lamp is on", "the blue lamp is on", "red", "blue"),
        ("one two three", "one two three four", "", " four"),
        ("same", "same", "", ""),
        ("", "anything", "", ""),
        ("nothing in common", "quite different words here", "", ""),
        ("東京は晴れです。", "東京は雨です。", "晴れ", "雨"),
        ("a\nb\nc d e f", "a\nb\nC d e f", "c", "C"),
    ],
)
def test_what_only_one_answer_says_is_marked(base: str, tuned: str, struck: str, new: str) -> None:
    ones, others = compared(base, tuned)
    assert "".join(text for text, _ in ones) == base
    assert "".join(text for text, _ in others) == tuned
    assert "".join(text for text, marked in ones if marked) == struck
    assert "".join(text for text, marked in others if marked) == new


def test_long_answers_stay_whole() -> None:
    base, tuned = "a b " * MOST_WORDS, "a c " * MOST_WORDS
    assert ["".join(text for text, _ in pieces) for pieces in compared(base, tuned)] == [base, tuned]


# --- charts -------------------------------------------------------------------------------------------


def test_shares_have_one_axis_and_other_metrics_their_own() -> None:
    narrow = Estimate(0.5, 0.45, 0.55)
    assert axis_of(0.0, 1.0, [narrow]) is page_charts.SHARE
    own = axis_of(0.0, None, [narrow, Estimate(0.7, 0.6, 0.8)], 0.9)
    assert 0.4 < own.low < 0.45
    assert 0.9 < own.high < 0.95
    same = axis_of(None, None, [Estimate(0.0, 0.0, 0.0)])
    assert same.low < 0 < same.high


def test_the_marks_of_an_interval_are_where_the_figures_are() -> None:
    chart = str(interval_chart(Estimate(0.2, 0.1, 0.3), Estimate(0.8, 0.7, 0.9), page_charts.SHARE, "it", 0.95))
    assert re.findall(r'circle class="(\w+)" cx="([\d.]+)%"', chart) == [("base", "20.00"), ("tuned", "80.00")]
    assert 'class="mark" x1="95.00%"' in chart
    assert '<line class="tuned" x1="70.00%" x2="90.00%"' in chart
    assert Axis(0.0, 1.0, ()).place(7.0) == 100  # never outside of the chart


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.3, 7.1), (-3.0, 2.0), (1e-6, 2e-6), (0.0, 98765.0), (2.0, 2.0)]
)
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = nice(low, high, 5)
    assert 1 <= len(found) <= 6
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)
    assert len(found) >= 3 or low == high


def test_a_long_curve_is_thinned_to_means() -> None:
    points = [(float(step), float(step)) for step in range(1, 100_001)]
    found = thinned(points)
    assert len(found) == page_charts.MOST_POINTS
    assert found == sorted(found)
    assert sum(value for _, value in found) / len(found) == pytest.approx(50_000.5, rel=1e-3)
    assert thinned(points[:300]) == points[:300]


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(5.0, -3.0), (6.0, 1e9)]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_lines_of_any_values_can_be_drawn(points: list[tuple[float, float]], from_zero: bool) -> None:
    chart = str(line_chart([Line("it", points, 99)], "it", from_zero=from_zero))
    assert "nan" not in chart
    assert chart.count("<path") == (1 if len(points) == 1 else 0)


def test_sources_are_told_apart_without_colour() -> None:
    html = shown()
    lines = [style for style in range(len(SOURCES)) if f'<polyline class="s{style}"' in html]
    assert lines == [0, 1, 2]
    assert len(set(page_charts.SHAPES)) == 6
    assert html.count("stroke-dasharray") >= 5
