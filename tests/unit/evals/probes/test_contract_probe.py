"""A model's answers are held against the very contract of their source's training answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.core.errors import ConfigError
from sftdist.data import answer_rules
from sftdist.data.contract import Contract
from sftdist.data.message import Message
from sftdist.evals.probes.contract import breaches, contract_probe
from sftdist.evals.prompts import Answer, Prompt

HERE, THERE = (Prompt(f"{source}/1", source, (Message("user", "Hi"),)) for source in ("here", "there"))


def contract(folder: Path, text: str) -> dict[str, Contract]:
    path = folder / "contract.yaml"
    path.write_text(text, encoding="utf-8")
    return {"here": Contract.load(path)}


def test_an_answer_keeps_the_contract_or_says_which_rules_it_breaks(tmp_path: Path) -> None:
    contracts = contract(tmp_path, "rules: {max_words: 2, forbidden: sorry}")
    probe = contract_probe(contracts)
    good, bad = Answer("All right", 1, True), Answer("I am sorry", 1, True)
    assert probe.score(HERE, good) == {"contract_kept": 1.0}
    assert probe.score(HERE, bad) == {"contract_kept": 0.0}
    assert [breach.rule for breach in breaches(contracts, HERE, bad)] == ["rules.max_words", "rules.forbidden"]
    assert probe.explain(HERE, good) == []
    assert probe.explain(HERE, bad)[0] == "rules.max_words: given 3 words, required at most 2"


def test_nothing_applies_to_a_source_without_a_contract(tmp_path: Path) -> None:
    probe = contract_probe(contract(tmp_path, "rules: {max_words: 2}"))
    assert probe.score(THERE, Answer("one two three", 1, True)) == {}
    assert probe.explain(THERE, Answer("one two three", 1, True)) == []


def test_a_rule_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_rules, "PATTERN_SECONDS", 0.05)
    probe = contract_probe(contract(tmp_path, "rules: {required: '(a|a)+$'}"))
    with pytest.raises(ConfigError, match=r"contract\.yaml: rules\.required"):
        probe.score(HERE, Answer("a" * 60 + "b", 1, True))
