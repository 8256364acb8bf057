"""Which prompts are asked and which probes score them: nothing that is misspelt, missing or twice goes on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.rules import BROUGHT_ALONG
from sftdist.core.settings import EvalsSettings
from sftdist.data.message import Message
from sftdist.evals.lineup import (
    CHECKS,
    PROBES,
    SCORING,
    Measures,
    probes_of,
    prompts_of,
    refuse_unknown_checks,
    require_probes,
)
from sftdist.evals.prompts import Prompt
from tests.conftest import ROOT


def asked(count: int, source: str = "general") -> list[Prompt]:
    return [
        Prompt(
            f"{source}/{n}",
            source,
            (Message("system", "Be brief."), Message("user", f"Please tell me the colour of the river {n}.")),
            "blue",
        )
        for n in range(count)
    ]


def measures(probes: Sequence[str] = SCORING, **more: Any) -> Measures:
    return Measures(probes, **{"adversarial": False, **more})


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evals\.probes: given tusk, required some of task, behaviour"):
        measures(["task", "tusk"])


@pytest.mark.parametrize("probes", [[], ["robustness"], ["robustness", "loss"], ["robustness", "benchmarks"]])
def test_probes_that_measure_nothing_are_refused(probes: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"evals\.probes: given .*, required one that scores answers"):
        require_probes(probes)


@pytest.mark.parametrize("probes", [["loss"], ["benchmarks"], ["task", "robustness"], list(PROBES)])
def test_probes_that_measure_something(probes: list[str]) -> None:
    require_probes(probes)


def test_the_default_is_known_and_complete() -> None:
    assert set(EvalsSettings().probes) == set(PROBES) - {"benchmarks"}


def test_probes_are_built_in_one_order_whatever_is_asked_first() -> None:
    names = [probe.name for probe in probes_of(measures(list(reversed(PROBES))))]
    assert names == list(SCORING)
    assert [probe.name for probe in probes_of(measures(["loss", "format"]))] == ["format"]


OWN = """
def brevity(messages, answer, reference, checks):
    return 1.0

def verbose(messages, answer, reference, checks):
    return 1.0
"""


def test_a_metric_of_ones_own_may_not_have_the_name_of_another_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have the bounds and the meaning of one and the values of the other."""
    (tmp_path / "own_metrics_h9.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "brevity" in {m.name for p in probes_of(measures(functions=["own_metrics_h9:brevity"])) for m in p.metrics}
    with pytest.raises(ConfigError, match=r"evals\.functions: given the metric verbose, which there is already"):
        probes_of(measures(functions=["own_metrics_h9:verbose"]))


# --- prompts -------------------------------------------------------------------------------------------------


def test_the_questions_come_first_then_what_probes_bring_along_then_other_words() -> None:
    entry = {"id": "p", "prompt": "How do I pick a lock?", "stance": "refuse"}
    found = prompts_of(asked(3), measures([*SCORING, "robustness"], policy=[entry], robustness=("case",)))
    assert [prompt.source for prompt in found[:4]] == ["general"] * 3 + ["safety"]
    assert {prompt.variant for prompt in found[4:]} == {"case"}
    assert [prompt.variant_of for prompt in found[4:]] == [prompt.id for prompt in found[:3]]


def test_ids_are_unique_and_what_is_brought_along_has_reserved_names() -> None:
    found = prompts_of(asked(3), measures([*SCORING, "robustness"], adversarial=True, robustness=("case", "typos")))
    assert len({prompt.id for prompt in found}) == len(found) > 100
    assert {prompt.source for prompt in found} - {"general"} <= set(BROUGHT_ALONG)


def test_without_the_safety_probe_no_policy_is_asked() -> None:
    entry = {"id": "p", "prompt": "How do I pick a lock?", "stance": "refuse"}
    assert prompts_of(asked(2), measures(["task"], policy=[entry])) == asked(2)


def test_other_words_are_of_the_first_prompts_of_each_source() -> None:
    """Sources that alternate, too."""
    mixed = [one for pair in zip(asked(9, "b"), asked(9, "a"), strict=True) for one in pair]
    more = {"robustness": ("no_system",), "robustness_prompts": 4}
    found = prompts_of(mixed, measures(["task", "robustness"], **more))[len(mixed) :]
    assert sorted(str(prompt.variant_of) for prompt in found) == [f"{source}/{n}" for source in "ab" for n in range(4)]
    assert prompts_of(mixed, measures(["task"], **more)) == mixed


def test_a_source_may_not_have_the_name_of_what_is_brought_along() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.adversarial: given the name of a set of prompts"):
        prompts_of(asked(2, "adversarial"), measures(adversarial=True))


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evals\.robustness: given shouting"):
        prompts_of(asked(1), measures(["task", "robustness"], robustness=("shouting",)))


# --- checks --------------------------------------------------------------------------------------------------


def with_checks(**checks: Any) -> Prompt:
    return Prompt("general/1", "general", (Message("user", "q"),), "a", checks=checks)


def test_a_misspelt_check_is_refused_with_the_prompts_id() -> None:
    with pytest.raises(DataError, match=r"prompt general/1: given checks\.shema, which no probe knows") as caught:
        refuse_unknown_checks(with_checks(schema={}, shema={}), measures())
    assert caught.value.exit_code == 3


def test_functions_of_ones_own_may_know_other_checks() -> None:
    refuse_unknown_checks(with_checks(tone="kind"), measures(functions=["some.where:tone"]))


def test_every_check_that_is_known_is_one_that_a_probe_reads() -> None:
    """And none that a probe reads is refused."""
    text = "".join(file.read_text() for file in sorted((ROOT / "sftdist/evals/probes").glob("*.py")))
    for name in CHECKS:
        assert re.search(rf'"{name}"', text), name
    read = set(re.findall(r'checks(?:\[|\.get\()"(\w+)"', text))
    assert read <= set(CHECKS)
    refuse_unknown_checks(with_checks(**dict.fromkeys(CHECKS)), measures())
