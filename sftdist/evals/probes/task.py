"""How like its reference an answer is, and a user's own metrics."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence

import regex
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from sftdist.core.errors import ConfigError
from sftdist.evals.metrics import Metric, Probe
from sftdist.evals.probes.choice import choices_of, chosen, right_choice
from sftdist.evals.probes.number import number_of, reference_number
from sftdist.evals.probes.own import FUNCTIONS, OwnMetrics
from sftdist.evals.probes.words import spaced, words_of
from sftdist.evals.prompts import Answer, Prompt

MOST_WORDS = 2_000  # of a text that ROUGE-L looks at: its time grows with the product of both lengths
MOST_CHARACTERS = 50_000  # of a text that chrF looks at

METRICS = (
    Metric(
        "exact_match",
        True,
        0.0,
        1.0,
        "share of answers that are the reference letter by letter; only white space around them does not count",
    ),
    Metric(
        "same_answer",
        True,
        0.0,
        1.0,
        "share of answers that are the reference when capital letters, punctuation, white space and the words a, an "
        "and the do not count",
    ),
    Metric(
        "token_f1",
        True,
        0.0,
        1.0,
        "how many words answer and reference share, in any order: F1 of precision and recall, as SQuAD counts it",
    ),
    Metric("accuracy", True, 0.0, 1.0, "share of answers that name the right one of the choices, and no other"),
    Metric(
        "numeric_match",
        True,
        0.0,
        1.0,
        "share of answers whose number (after ####, else the last one) equals that of the reference",
    ),
    Metric(
        "rouge_l",
        True,
        0.0,
        1.0,
        "the longest run of words that answer and reference have in the same order, gaps allowed: F1 of ROUGE-L",
    ),
    Metric(
        "chrf",
        True,
        0.0,
        1.0,
        "how many short pieces of 1 to 6 characters answer and reference share: chrF, from 0 to 1",
    ),
)


def task_probe(functions: Sequence[str] = ()) -> Probe:
    """Metrics beside the reference, and those of a user's functions (`package.module:function`).

    A function takes (messages: list of dicts, answer: str, reference: str | None, checks: dict). It returns a number
    of 0 to 1, which becomes the metric of its name; or None where it does not apply. One that says more carries
    `function.metrics = {"tone": {"meaning": ..., "low": 0, "high": 5, "higher_is_better": True}, ...}` and returns
    numbers by these names. Raises ConfigError for a function that cannot be had.
    """
    own = [OwnMetrics(path) for path in functions]
    metrics = METRICS + tuple(metric for one in own for metric in one.metrics.values())
    twice = [name for name, count in Counter(metric.name for metric in metrics).items() if count > 1]
    if twice:
        raise ConfigError(f"{FUNCTIONS}: given the metric {twice[0]} twice, required each name once")

    def score(prompt: Prompt, answer: Answer) -> dict[str, float]:
        found = _beside_reference(prompt, answer.spoken)
        for one in own:
            found |= one.score(prompt, answer.spoken)
        return found

    return Probe("task", metrics, score, check=_check)


def _check(prompt: Prompt) -> None:
    if "choices" in prompt.checks:
        right_choice(prompt)


def _beside_reference(prompt: Prompt, answer: str) -> dict[str, float]:
    """Nothing for a prompt without a reference, or with one that is a call of tools, written as no model writes it."""
    reference = prompt.reference
    if reference is None or "tool_calls" in prompt.checks:
        return {}
    found = {
        "exact_match": exact_match(answer, reference),
        "same_answer": same_answer(answer, reference),
        "token_f1": token_f1(answer, reference),
    }
    if words_of(reference):
        found["rouge_l"] = rouge_l(answer, reference)
    if reference.strip():
        found["chrf"] = chrf(answer, reference)
    if (wanted := reference_number(reference)) is not None:
        found["numeric_match"] = float(number_of(answer) == wanted)
    if "choices" in prompt.checks:
        found["accuracy"] = float(chosen(answer, choices_of(prompt)) == right_choice(prompt))
    return found


# --- text ------------------------------------------------------------------------------------------------


def exact_match(answer: str, reference: str) -> float:
    """1.0 where the texts differ in white space at their ends at most: capital letters count."""
    return float(answer.strip() == reference.strip())


_PUNCTUATION = regex.compile(
    # but not a point or sign that makes another number: 3.5, -5
    rf"(?<=\d)\.(?=\d)(*SKIP)(*FAIL)|(?<!\w)[-\u2212](?=\.?\d)(*SKIP)(*FAIL)|[{regex.escape(string.punctuation)}\p{{P}}]"
)
_ARTICLES = regex.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """A text as SQuAD compares it (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, without punctuation and
    English articles, single spaces.

    Other than there, a decimal point and the sign of a number stay (3.5 is not 35), the punctuation of all scripts
    goes, and characters of scripts without spaces are words of their own, as in MLQA.
    """
    return " ".join(spaced(_ARTICLES.sub(" ", _PUNCTUATION.sub("", text.lower()))).split())


def same_answer(answer: str, reference: str) -> float:
    """1.0 where the texts are the same as SQuAD compares them."""
    return float(normalised(answer) == normalised(reference))


def token_f1(answer: str, reference: str) -> float:
    """The F1 of SQuAD over normalised words; where one text has none, 1.0 if the other has none either."""
    given, wanted = normalised(answer).split(), normalised(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    return 2 * sum((Counter(given) & Counter(wanted)).values()) / (len(given) + len(wanted))


class _Words:
    """rouge-score's own tokenizer knows no letters but a to z: any answer in Chinese would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)[:MOST_WORDS]


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())
_CHRF = CHRF()


def rouge_l(answer: str, reference: str) -> float:
    """The F1 of ROUGE-L (Lin 2004, https://aclanthology.org/W04-1013), without stemming, of the first 2,000 words."""
    return float(_ROUGE.score(reference, answer)["rougeL"].fmeasure)


def chrf(answer: str, reference: str) -> float:
    """chrF2 (Popović 2015, https://aclanthology.org/W15-3049) of sacrebleu divided by 100, of the first 50,000
    characters."""
    return float(_CHRF.sentence_score(answer[:MOST_CHARACTERS], [reference[:MOST_CHARACTERS]]).score) / 100
