"""From the scores of each answer to the metrics of a report: which prompts a metric is about, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftdist.data.held_out import message_to_json
from sftdist.evals.metrics import Metric
from sftdist.evals.prompts import Answer, Prompt
from sftdist.evals.report import Scores

Fall = Callable[[Mapping[str, float], Mapping[str, float]], float | None]


@dataclass(frozen=True)
class Given:
    """What one model said to every prompt, by the prompt's id, and what each answer is worth, by metric."""

    answers: Mapping[str, Answer]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


def metrics_of(
    prompts: Sequence[Prompt], known: Mapping[str, Metric], tuned: Given, base: Given | None
) -> dict[str, Scores]:
    """`<source>.<metric>` over the prompts as they are; prompts that say another one in other words are left out.

    Where there is a base, a metric is about the prompts that both models have a score for: they are compared in pairs.
    """
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        if prompt.variant is None:
            for name in _both(prompt.id, tuned, base):
                found.setdefault(f"{prompt.source}.{name}", []).append(prompt.id)
    return {
        name: _scores(ids, known[name.rpartition(".")[2]], name.rpartition(".")[2], tuned, base)
        for name, ids in sorted(found.items())
    }


def robustness_of(prompts: Sequence[Prompt], fall: Fall, tuned: Given, base: Given | None) -> dict[str, Scores]:
    """`robustness.<variant>`: how far the score of an answer moves when the same is asked in other words."""
    found: dict[str, tuple[list[str], list[float], list[float]]] = {}
    for prompt in prompts:
        if prompt.variant is None or prompt.variant_of is None:
            continue
        moved = [_moved(prompt, fall, model) for model in (tuned, base) if model is not None]
        if None in moved:
            continue
        ids, of_tuned, of_base = found.setdefault(prompt.variant, ([], [], []))
        ids.append(prompt.id)
        for values, value in zip((of_tuned, of_base), moved, strict=False):
            values.append(float(value or 0.0))
    meaning = "how far the main score of an answer moves when the prompt is {}; 0 is not at all"
    return {
        f"robustness.{variant}": Scores(
            ids, of_tuned, None if base is None else of_base, low=-1.0, meaning=meaning.format(_changed(variant))
        )
        for variant, (ids, of_tuned, of_base) in sorted(found.items())
    }


def rows_of(prompts: Sequence[Prompt], tuned: Given, base: Given | None) -> list[dict[str, Any]]:
    """A line per prompt with everything that was said and what it is worth."""
    return [_row(prompt, tuned, base) for prompt in prompts]


def _row(prompt: Prompt, tuned: Given, base: Given | None) -> dict[str, Any]:
    names = dict.fromkeys([*tuned.scores[prompt.id], *({} if base is None else base.scores[prompt.id])])
    return {
        "id": prompt.id,
        "source": prompt.source,
        "tags": list(prompt.tags),
        "turn": prompt.turn,
        "variant": prompt.variant,
        "variant_of": prompt.variant_of,
        "prompt": [message_to_json(message) for message in prompt.messages],
        "tools": list(prompt.tools),
        "reference": prompt.reference,
        "checks": dict(prompt.checks),
        "base": None if base is None else base.answers[prompt.id].text,
        "tuned": tuned.answers[prompt.id].text,
        "finished": {
            "base": None if base is None else base.answers[prompt.id].finished,
            "tuned": tuned.answers[prompt.id].finished,
        },
        "scores": {
            name: {
                "base": None if base is None else base.scores[prompt.id].get(name),
                "tuned": tuned.scores[prompt.id].get(name),
            }
            for name in names
        },
    }


def _both(id: str, tuned: Given, base: Given | None) -> list[str]:
    return [name for name in tuned.scores[id] if base is None or name in base.scores[id]]


def _scores(ids: list[str], metric: Metric, name: str, tuned: Given, base: Given | None) -> Scores:
    return Scores(
        ids=ids,
        tuned=[tuned.scores[id][name] for id in ids],
        base=None if base is None else [base.scores[id][name] for id in ids],
        higher_is_better=metric.higher_is_better,
        low=metric.low,
        high=metric.high,
        meaning=metric.meaning,
    )


def _moved(prompt: Prompt, fall: Fall, model: Given) -> float | None:
    original = model.scores.get(str(prompt.variant_of))
    return None if original is None else fall(original, model.scores[prompt.id])


def _changed(variant: str) -> str:
    words = {"typos": "misspelt", "case": "in other case", "paraphrase": "put in other words"}
    return words.get(variant, "asked without its system message" if variant == "no_system" else variant)
