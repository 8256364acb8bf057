"""A finished evaluation with everything that its page can show, and a hostile text wherever text can come from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sftdist.core.runfacts import Mixed, RunFacts
from sftdist.evals.advice import Advice, Fell
from sftdist.evals.intervals import Figures
from sftdist.evals.remix import Mixture
from sftdist.evals.report import EvalReport, ModelFacts, Scores
from sftdist.evals.slices import Slice
from sftdist.release.gate import decide
from sftdist.release.rule import read_rules
from tests.reports import EVIL

SOURCES = ("domain", "general", "format")
RIGHT = {"domain": (0.2, 0.9), "general": (0.7, 0.5), "format": (0.3, 0.95)}  # base, tuned
RULES = (
    "format.exact_match >= 0.97",
    "domain.exact_match >= base + 0.1",
    "general.exact_match >= base - 0.02",
    "format.rouge_l >= base - 0.01",
    "domain.nothing >= 0.5",
    "general.rouge_l >= last - 0.02",
)


def row(source: str, number: int, base: float, tuned: float, text: str = "") -> dict[str, Any]:
    """A line of rows.jsonl; both answers say something of `text`."""
    words = f"the {source} answer to question {number}{text}"
    return {
        "id": f"{source}/{number}{text}",
        "source": source,
        "tags": ["short", *([text] if text else [])],
        "turn": 0,
        "variant": None,
        "variant_of": None,
        "prompt": [{"role": "system", "content": f"Be brief.{text}"}, {"role": "user", "content": f"{number}?{text}"}],
        "reference": f"This is {words}.",
        "checks": {},
        "base": f"This is {words if base else f'no answer to {number}{text}'}.",
        "tuned": f"This is {words if tuned else f'another answer to {number}{text}'}!",
        "finished": {"base": True, "tuned": bool(tuned)},
        "scores": {
            "exact_match": {"base": base, "tuned": tuned},
            "rouge_l": {"base": 0.5 + base / 2, "tuned": 0.4 + tuned / 2},
            "length_ratio": {"base": 1.0, "tuned": 1.2},
        },
    }


def rows(n: int, text: str = "") -> list[dict[str, Any]]:
    """`n` of each source, right as often as RIGHT says."""
    draw = random.Random(0)
    found = []
    for source, (base, tuned) in RIGHT.items():
        for number in range(n):
            found.append(row(source, number, float(draw.random() < base), float(draw.random() < tuned), text))
    return found


def report(found: list[dict[str, Any]], text: str = "", **changes: Any) -> EvalReport:
    """The report of these rows, with a loss that has no rows, and a metric that is damaged."""
    metrics: dict[str, Scores] = {}
    for one in found:
        for name, score in one["scores"].items():
            direction = None if name == "length_ratio" else True
            bound = None if name == "length_ratio" else 1.0
            meaning = f"what {name} means{text}"
            full = f"{one['source']}.{name}"
            empty = Scores([], [], [], higher_is_better=direction, high=bound, meaning=meaning)
            scores = metrics.setdefault(full, empty)
            scores.ids.append(one["id"])
            scores.tuned.append(score["tuned"])
            assert scores.base is not None
            scores.base.append(score["base"])
    losses = [2.0 + n / 40 for n in range(60)]
    metrics["all.loss"] = Scores(
        [f"l{n}" for n in range(60)],
        [loss / 2 for loss in losses],
        losses,
        [float(1 + n % 7) for n in range(60)],
        higher_is_better=False,
        high=None,
        meaning="mean loss of a supervised token",
    )
    metrics[f"domain.damaged{text}"] = Scores(["a"], [3.0])
    return EvalReport(
        **{
            "created": "2026-11-23T04:00:00+00:00",
            "split": "validation",
            "tuned": ModelFacts(f"runs/r/export{text}", "a" * 64, {"model.safetensors": "b" * 64}),
            "base": ModelFacts(f"base{text}", "c" * 64),
            "decoding": {"engine": "hf", "dtype": "fp32", "batch_size": 16, "greedy": True, "max_new_tokens": 256},
            "data": {"prompts": {f"domain{text}": 60}, "looks": 3, "left_out": {f"safety/1{text}": f"no role{text}"}},
            "metrics": metrics,
            "versions": {"torch": "2.13.0"},
            "seconds": {"answers of tuned": 12.3},
            **changes,
        }
    )


def figures_of(given: EvalReport, resamples: int = 200) -> dict[str, Figures]:
    return {name: scores.figures(resamples=resamples) for name, scores in given.metrics.items() if not scores.fault()}


def decision_of(given: EvalReport, rules: tuple[Any, ...] = RULES) -> dict[str, Any]:
    """The gate's real decision, as JSON."""
    read, issues = read_rules(rules, min_prompts=20, confidence=0.95)
    assert not issues
    return asdict(decide(read, given, model_sha256=given.tuned.sha256))


def run(text: str = "", steps: int = 40) -> RunFacts:
    """A run whose general source was trained on less than was asked for."""
    curves = {
        f"loss/{name}": [(step, 4.0 / (step + place)) for step in range(1, steps + 1)]
        for place, name in enumerate(SOURCES)
    }
    manifest = {
        "licence": f"CC0{text}",
        "origin": None,
        "stages": {"read": {"rows": 1500}, "bad": {"rows": 3}, "kept": {"rows": 1497}},
        "splits": {
            name: {"rows": 100, "tokens": 4000, "targets": 1000.5} for name in ("train", "validation", "holdout")
        },
    }
    return RunFacts(
        path=Path(f"runs/r{text}"),
        name=f"r{text}",
        steps=steps,
        planned=steps + 1,
        seconds=61.2,
        tokens=123_456,
        mixture=(
            Mixed(f"domain{text}", 0.5, 0.52, 0.3),
            Mixed("general", 0.3, 0.2, 1.2),
            Mixed("format", 0.2, 0.28, 2.0),
        ),
        curves={
            **curves,
            f"loss/domain{text}": curves["loss/domain"],
            "eval/loss": [(steps, 0.61)],
            "eval/loss/general": [(steps // 2, 0.9), (steps, 0.8)],
            "lr": [(step, 0.001 * step / steps) for step in range(1, steps + 1)],
            "tokens_per_second": [(step, 4000.0 + step % 7) for step in range(1, steps + 1)],
        },
        config={},
        data={"sources": {f"domain{text}": manifest}},
    )


def advice(text: str = "") -> Advice:
    """What fell, what is weak, and a mixture to try."""
    mixture = Mixture({"general": 0.3}, {"general": 0.5}, [f"general fell{text}"], f"data.mix={{general:0.5}}{text}")
    weak = [Slice(f"general{text}", "tag", f"short{text}", "rouge_l", 20, 0.3, None, 0.6, -0.3, -0.4, -0.2)]
    return Advice([Fell(f"general.rouge_l{text}", 40, -0.162, -0.3, -0.01)], weak * 30, mixture, 12, 34)


def everything(text: str = EVIL, n: int = 40) -> Mapping[str, Any]:
    """What `write_page` takes, beside the folder."""
    found = rows(n, text)
    given = report(found, text)
    decision = decision_of(given)
    decision["verdicts"][0]["words"] += text
    decision["reasons"].append(f"reason{text}")
    return {
        "report": given,
        "rows": found,
        "figures": figures_of(given),
        "decision": decision,
        "advice": advice(text),
        "run": run(text),
    }
