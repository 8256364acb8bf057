"""From scores to metrics and rows: who is compared with whom, and over which prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from sftdist.data.message import Message
from sftdist.evals.aggregate import Given, metrics_of, robustness_of, rows_of
from sftdist.evals.metrics import Metric
from sftdist.evals.probes.robustness import fall
from sftdist.evals.prompts import Answer, Prompt

KNOWN = {
    "exact_match": Metric("exact_match", True, 0.0, 1.0, "share that is right"),
    "length_ratio": Metric("length_ratio", None, 0.0, None, "how long"),
    "unfinished": Metric("unfinished", False, 0.0, 1.0, "cut off"),
}


def prompt(id: str, source: str = "general", **more: Any) -> Prompt:
    return Prompt(f"{source}/{id}", source, (Message("user", f"question {id}"),), f"answer {id}", **more)


def given(scores: Mapping[str, Mapping[str, float]]) -> Given:
    answers = {id: Answer(f"said {id}", 3, True) for id in scores}
    return Given(answers, {id: dict(values) for id, values in scores.items()})


PROMPTS = [prompt("1"), prompt("2"), prompt("3", "my.source")]
TUNED = given(
    {
        "general/1": {"exact_match": 1.0, "length_ratio": 2.0},
        "general/2": {"exact_match": 0.0, "unfinished": 1.0},
        "my.source/3": {"exact_match": 1.0},
    }
)
BASE = given(
    {
        "general/1": {"exact_match": 0.0, "length_ratio": 1.0},
        "general/2": {"exact_match": 1.0, "length_ratio": 9.0},
        "my.source/3": {},
    }
)


def test_a_metric_is_about_the_prompts_that_have_a_score() -> None:
    found = metrics_of(PROMPTS, KNOWN, TUNED, None)
    assert list(found) == sorted(found)
    assert {name: (one.ids, one.tuned, one.base) for name, one in found.items()} == {
        "general.exact_match": (["general/1", "general/2"], [1.0, 0.0], None),
        "general.length_ratio": (["general/1"], [2.0], None),
        "general.unfinished": (["general/2"], [1.0], None),
        "my.source.exact_match": (["my.source/3"], [1.0], None),
    }
    one = found["general.length_ratio"]
    assert (one.higher_is_better, one.low, one.high, one.meaning, one.weights) == (None, 0.0, None, "how long", None)
    assert found["general.unfinished"].higher_is_better is False


def test_with_a_base_they_are_compared_in_pairs() -> None:
    """Wrong would be the mean of all of each: only the tuned model has a score for my.source/3, only the base a
    length for general/2."""
    found = metrics_of(PROMPTS, KNOWN, TUNED, BASE)
    assert {name: (one.ids, one.tuned, one.base) for name, one in found.items()} == {
        "general.exact_match": (["general/1", "general/2"], [1.0, 0.0], [0.0, 1.0]),
        "general.length_ratio": (["general/1"], [2.0], [1.0]),
    }
    assert all(one.fault() is None for one in found.values())


OTHER_WORDS = [
    prompt("1~case", variant="case", variant_of="general/1"),
    prompt("2~case", variant="case", variant_of="general/2"),
    prompt("1~typos", variant="typos", variant_of="general/1"),
]


def test_prompts_in_other_words_are_in_no_metric_but_that_of_how_far_scores_fall() -> None:
    tuned = given(
        {
            **TUNED.scores,
            "general/1~case": {"exact_match": 0.0},
            "general/2~case": {"exact_match": 1.0},
            "general/1~typos": {"length_ratio": 2.0},
        }
    )
    prompts = [*PROMPTS, *OTHER_WORDS]
    assert metrics_of(prompts, KNOWN, tuned, None) == metrics_of(PROMPTS, KNOWN, TUNED, None)
    found = robustness_of(prompts, fall, tuned, None)
    assert {name: (one.ids, one.tuned, one.base, one.low, one.high) for name, one in found.items()} == {
        "robustness.case": (["general/1~case", "general/2~case"], [-1.0, 1.0], None, -1.0, 1.0)
    }, "typos have no main score in common with their original"
    assert "in other case" in found["robustness.case"].meaning


def test_how_far_scores_fall_is_compared_in_pairs_too() -> None:
    tuned = given({**TUNED.scores, "general/1~case": {"exact_match": 1.0}, "general/2~case": {"exact_match": 1.0}})
    base = given({**BASE.scores, "general/1~case": {"exact_match": 1.0}, "general/2~case": {}})
    found = robustness_of([*PROMPTS, *OTHER_WORDS[:2]], fall, tuned, base)["robustness.case"]
    assert (found.ids, found.tuned, found.base) == (["general/1~case"], [0.0], [1.0])
    assert found.fault() is None


def test_a_variant_whose_original_was_not_asked_counts_nowhere() -> None:
    lost = prompt("9~case", variant="case", variant_of="general/9")
    assert robustness_of([lost], fall, given({"general/9~case": {"exact_match": 1.0}}), None) == {}


def test_a_row_says_everything_about_a_prompt() -> None:
    asked = prompt("1", checks={"regex": "a"}, tags=("t",), turn=2, tools=({"name": "look"},))
    tuned = Given({asked.id: Answer("<think>hm</think> yes", 9, False)}, {asked.id: {"exact_match": 1.0}})
    base = Given({asked.id: Answer("no", 1, True)}, {asked.id: {"length_ratio": 0.5}})
    (row,) = rows_of([asked], tuned, base)
    assert json.loads(json.dumps(row)) == {
        "id": "general/1",
        "source": "general",
        "tags": ["t"],
        "turn": 2,
        "variant": None,
        "variant_of": None,
        "prompt": [{"role": "user", "content": "question 1"}],
        "tools": [{"name": "look"}],
        "reference": "answer 1",
        "checks": {"regex": "a"},
        "base": "no",
        "tuned": "<think>hm</think> yes",
        "finished": {"base": True, "tuned": False},
        "scores": {
            "exact_match": {"base": None, "tuned": 1.0},
            "length_ratio": {"base": 0.5, "tuned": None},
        },
    }


def test_without_a_base_a_row_has_none() -> None:
    rows = rows_of(PROMPTS, TUNED, None)
    assert [row["id"] for row in rows] == [one.id for one in PROMPTS]
    assert {(row["base"], row["finished"]["base"]) for row in rows} == {(None, None)}
    assert rows[0]["scores"]["exact_match"] == {"base": None, "tuned": 1.0}


def test_a_metric_that_no_probe_knows_is_no_metric() -> None:
    with pytest.raises(KeyError):
        metrics_of([prompt("1")], KNOWN, given({"general/1": {"unheard": 1.0}}), None)
