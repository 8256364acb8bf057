"""How like its reference an answer is."""

from __future__ import annotations

from sftdist.evals.metrics import Metric, Probe
from sftdist.evals.prompts import Answer, Prompt

METRICS = (
    Metric(
        "exact_match",
        True,
        0.0,
        1.0,
        "share of answers that are the reference, letter by letter; only white space around them does not count",
    ),
)


def task_probe() -> Probe:
    """Metrics that compare an answer with the reference; nothing applies to a prompt without one."""
    return Probe("task", METRICS, _score)


def exact_match(answer: str, reference: str) -> float:
    """1.0 where the texts differ in white space at their ends at most: capital letters count."""
    return float(answer.strip() == reference.strip())


def _score(prompt: Prompt, answer: Answer) -> dict[str, float]:
    if prompt.reference is None:
        return {}
    return {"exact_match": exact_match(answer.text, prompt.reference)}
