"""A probe of the user's own scores every answer, and what it gives is held against its own metrics."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from sftdist.core.errors import ConfigError
from sftdist.data.schema import Message
from sftdist.evals.lineup import Measures, code_of, metric_names, probes_of, require_probes
from sftdist.evals.prompts import Answer, Prompt

OWN = """
from sftdist.evals.metrics import Metric, Probe

POLITE = Metric("polite", True, 0.0, 1.0, "says please")
READY = Probe("ready", (POLITE,), lambda prompt, answer: {"polite": float("please" in answer.spoken)})


def made():
    return READY


def needs(argument):
    return READY


def broken():
    raise KeyError("no file")


def nothing():
    return None


def scoring(score):
    return lambda: Probe("own", (POLITE,), score)


large = scoring(lambda prompt, answer: {"polite": 2})
unknown = scoring(lambda prompt, answer: {"plite": 1})
words = scoring(lambda prompt, answer: {"polite": "very"})
number = scoring(lambda prompt, answer: 1.0)
raising = scoring(lambda prompt, answer: {}["polite"])
twice = lambda: Probe("own", (Metric("exact_match", True, 0.0, 1.0, "again"),), lambda prompt, answer: {})
"""
PROMPT = Prompt("s/1", "s", (Message("user", "Hello"),), None)


def said(text: str) -> Answer:
    return Answer(text, len(text), finished=True)


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_probes.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("own_probes", None)


@pytest.mark.parametrize("name", ["READY", "made"])
def test_it_stands_beside_ours(name: str) -> None:
    measures = Measures(probes=["task", f"own_probes:{name}"])
    ours, own = probes_of(measures)
    assert (ours.name, own.name) == ("task", "ready")
    assert own.score(PROMPT, said("Yes, please")) == {"polite": 1.0}
    assert own.score(PROMPT, said("Yes")) == {"polite": 0.0}
    assert len(code_of(measures)[f"own_probes:{name}"]) == 64


def test_it_may_be_the_only_one_and_the_gate_knows_its_metrics() -> None:
    require_probes(["own_probes:made"])
    assert "polite" in metric_names([], ["task", "own_probes:made"])
    assert "polite" not in metric_names([], ["task"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("needs", "given own_probes:needs, required a sftdist.evals.metrics.Probe, or a function without arguments"),
        ("broken", r"own_probes:broken raised KeyError: 'no file' \(own_probes.py, line 17\)"),
        ("nothing", "own_probes:nothing gave NoneType, required"),
        ("absent", "given own_probes:absent, required a name"),
        ("twice", "given the metric exact_match, which there is already"),
    ],
)
def test_what_is_no_probe_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"evals.probes: {words}"):
        probes_of(Measures(probes=["task", f"own_probes:{name}"]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("large", "gave 2 for polite, required a number of 0 to 1"),
        ("unknown", "gave the metric .*plite.*, required one of its own: polite"),
        ("words", "gave .*very.* for polite, required a number"),
        ("number", "gave 1.0, required a number by the name of each metric"),
        ("raising", r"raised KeyError: 'polite' \(own_probes.py, line 32\)"),
    ],
)
def test_a_score_that_is_none_ends_the_evaluation_in_words(name: str, words: str) -> None:
    (probe,) = probes_of(Measures(probes=[f"own_probes:{name}"]))
    with pytest.raises(ConfigError, match=f"evals.probes: own_probes:{name}: at s/1: {words}"):
        probe.score(PROMPT, said("Yes"))
