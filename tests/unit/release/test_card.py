"""The model card: valid for the Hub, true to the report, and no promise that nothing backs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from sftdist.core.runfacts import RunFacts
from sftdist.core.settings import ModelSettings, TrainConfig, TuneSettings
from sftdist.core.snapshot import to_dict
from sftdist.evals.report import EvalReport
from sftdist.release.card import Card
from sftdist.release.gate import decide
from sftdist.release.hub import require_card
from sftdist.release.rule import read_rules
from tests.evaluations import report, rows, run
from tests.reports import EVIL

LEDGER = {
    "config": "e" * 64,
    "git": {"commit": "f" * 40, "dirty": True},
    "hardware": {"ranks": 8, "device": "NVIDIA H200"},
    "versions": {"torch": "2.13.0"},
}


def facts(base: str = "quickstart/base", **changes: Any) -> RunFacts:
    config = to_dict(TrainConfig(model=ModelSettings(path=base), tune=TuneSettings(**changes)))
    found = run()
    source: dict[str, Any] = dict(found.data["sources"]["domain"])
    coverage = {"tags": {"refund": 5, "billing": 9}, "origins": {"human": 60, "synthetic:m": 40}}
    sources = {
        "domain": {**source, "coverage": coverage, "contract": "abc"},
        "general": {**source, "licence": None, "origin": "hub:team/general-chat"},
    }
    return replace(
        found, config=config, data={"holdout": {"rows": 7, "locked": True, "version": 2}, "sources": sources}
    )


def card(
    given: EvalReport | None = None, run: RunFacts | None = None, ledger: Any = LEDGER, folder: bool = True
) -> str:
    given = given or report(rows(60), split="holdout")
    rules, _ = read_rules(["format.exact_match >= 0.5", "domain.exact_match >= base"], min_prompts=20, confidence=0.95)
    decision = decide(rules, given, model_sha256=given.tuned.sha256)
    return Card("support-bot", 3, "2026-11-23T04:00:00Z", given, decision, run or facts(), ledger, folder).text()


def header(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_hub_takes_the_card_and_reads_its_results() -> None:
    text = card()
    require_card(text)
    data: Any = ModelCard(text).data
    assert data.library_name == "transformers"
    assert data.model_name == "support-bot"
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results or []}
    given = report(rows(60))
    for name, (source, metric) in {
        "format.exact_match": ("format (holdout)", "exact_match"),
        "domain.rouge_l": ("domain (holdout)", "rouge_l"),
    }.items():
        assert found[source, metric] == pytest.approx(given.metrics[name].figures().tuned.value, abs=1e-4)
    assert not any("damaged" in metric for _, metric in found), "what cannot be a figure is not shown as one"


def test_base_and_datasets_are_named_only_where_the_hub_knows_them() -> None:
    """`quickstart/base` looks like a name on the Hub, and is a folder; `./base` is no name at all."""
    assert "base_model" not in header(card())
    assert "The base model `quickstart/base` (a folder)" in card()
    assert "base_model" not in header(card(run=facts("./base"), folder=False))
    found = header(card(run=facts("team/base-7b"), folder=False))
    assert (found["base_model"], found["base_model_relation"]) == ("team/base-7b", "finetune")
    assert found["datasets"] == ["team/general-chat"]
    assert "license" not in found, "nobody has stated one"


def test_what_is_known_stands_there() -> None:
    text = card(report(rows(300), split="holdout", data={"looks": 3}))
    for words in (
        "# support-bot v3",
        "| domain | CC0 | not stated | 100 | 100 | 100 | 0.5 | 52.0% | 0.30 | human (60), synthetic:m (40) |",
        "| domain | 52.0% | 100 | billing, refund | yes |",
        "No licence is stated for general: find it out before the model is passed on.",
        "8 x NVIDIA H200",
        "| time in steps | 61 s |",
        "This holdout was looked at 3 times, this release included.",
        "Held out: 7 conversations, locked, version 2.",
        "ffff, with changes that were not committed",
        "learning rate 2e-05, cosine, 3% warm-up",
        "format.exact_match >= 0.5",
        "No conversation that it learned from is longer than 8,192 tokens.",
        "all weights",
        "a" * 64,
    ):
        assert words in text, words
    scores = report(rows(300)).metrics["domain.exact_match"].figures()
    assert scores.change is not None
    line = next(line for line in text.splitlines() if line.startswith("| domain.exact_match | 300 |"))
    assert f"{scores.tuned.value:.3f} [{scores.tuned.low:.3f}, {scores.tuned.high:.3f}]" in line
    assert f"{scores.change.value:.3f} [{scores.change.low:.3f}" in line
    assert "in: `general.exact_match`" in text, "it is said where the model is worse than its base"
    assert "domain.exact_match`" not in text.split("It is worse than its base")[1].split("\n")[0]


def test_what_is_not_known_is_said_to_be_so() -> None:
    text = card(report(rows(60), base=None, split="holdout", data={}), facts(method="lora", r=8), ledger={})
    assert "| hardware | not stated |" in text
    assert "adapters (LoRA), rank 8, alpha 32, merged into the base" in text
    assert "looked at" not in text
    assert "TODO" not in text
    assert "More Information Needed" not in text


def test_no_text_from_outside_breaks_the_card() -> None:
    text = card(report(rows(60, EVIL), EVIL, split="holdout"), replace(facts(), name=f"r{EVIL}|x\ny"))
    require_card(text)
    assert "<script" not in text.split("---\n", 2)[2]
    for line in text.splitlines():
        if line.startswith("| run |"):
            assert line.count(" | ") == 1, "a bar in a cell is no new cell"
