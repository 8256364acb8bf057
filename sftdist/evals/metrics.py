"""What a probe is: metrics with what they mean, and a function that scores one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sftdist.evals.prompts import Answer, Prompt


@dataclass(frozen=True)
class Metric:
    """One figure. Values lie in `low` to `high` (None: no bound).

    `higher_is_better` None: the figure describes and cannot be better or worse. `meaning` is a short sentence for
    people.
    """

    name: str
    higher_is_better: bool | None
    low: float | None
    high: float | None
    meaning: str


def _nothing_to_check(prompt: Prompt) -> None:
    pass


def _nothing_to_say(prompt: Prompt, answer: Answer) -> list[str]:
    return []


@dataclass(frozen=True)
class Probe:
    """Metrics that are scored together.

    `score` gives the metrics that apply to the prompt, by name, and no others. It takes any text for an answer. What is
    asked for is looked for in `Answer.spoken`, what must not be said at all in `Answer.text`, thoughts and all.
    `check` raises DataError for checks of a prompt that no answer can be held against: called for all prompts before
    any model answers. `explain` says in words what is wrong with an answer.
    """

    name: str
    metrics: tuple[Metric, ...]
    score: Callable[[Prompt, Answer], dict[str, float]]
    check: Callable[[Prompt], None] = _nothing_to_check
    explain: Callable[[Prompt, Answer], list[str]] = _nothing_to_say
