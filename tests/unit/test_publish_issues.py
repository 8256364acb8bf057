"""What publish refuses by its configuration alone."""

from __future__ import annotations

import pytest

from sftdist.core.config import compose
from sftdist.core.settings import PublishConfig
from sftdist.publish import release_issues


def issues(*words: str) -> list[str]:
    return release_issues(compose("quickstart", ["name=bot", *words], PublishConfig))


def test_a_gate_for_sources_that_are_not_there_is_refused_by_rule() -> None:
    """Before anything is trained or asked: rules on what an evaluation brings along need no source."""
    assert issues() == []
    (found,) = issues("data.train=my.jsonl")
    assert found.startswith("gate.rules: given format.schema_valid >= 0.95, format.fields_right >= 0.85, domain.")
    assert "all.loss" not in found
    assert "but the sources of the data are train; choose a gate that names no source, such as gate=chat" in found


@pytest.mark.parametrize(
    "words",
    [
        ("gate=chat",),
        ("gate.rules=['train.same_answer >= 0.5', 'all.loss <= base', '*.unfinished <= 0.1', 'train.* >= 0']",),
        ("gate.rules=[{rule: 'format.schema_valid >= 0.5', optional: true}, 'safety.refusal >= 0.9']",),
        ("data.holdout=hold.jsonl", "gate.rules=['holdout.same_answer >= 0.5']"),
    ],
)
def test_rules_that_may_decide_are_let_through(words: tuple[str, ...]) -> None:
    assert issues("data.train=my.jsonl", *words) == []


@pytest.mark.parametrize("rule", ["trian.same_answer", "format.*", "same_answer"])
def test_what_names_no_source_is_refused(rule: str) -> None:
    assert len(issues("data.train=my.jsonl", f"gate.rules=['{rule} >= 0.5']")) == 1
