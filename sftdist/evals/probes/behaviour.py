"""How an answer behaves, whatever it is about: follows instructions, keeps short, ends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sftdist.evals.metrics import Metric, Probe
from sftdist.evals.probes.instructions import CHECKS, broken, instruction_scores, instructions_of
from sftdist.evals.probes.words import words_and_signs, words_of
from sftdist.evals.prompts import Answer, Prompt

VERBOSE_TIMES, VERBOSE_WORDS = 3, 50  # longer than both is verbose
REPEATS = 4  # times in a row that something stands in a loop, at least
LOOP_WORDS = 20  # of all these times together
LOOP_SIGNS = 100  # where no word is among them; only at the end, since tables and rules are made of equal signs
LONGEST_UNIT = 200  # words and signs that come again
LOOKED_AT = 20_000  # characters at the end of an answer: a loop does not stop by itself
LONGEST_WORD = 50  # letters; a longer one is looked at letter by letter

METRICS = (
    Metric("instructions_strict", True, 0.0, 1.0, "share of answers that follow every instruction of their prompt"),
    Metric(
        "instructions_loose",
        True,
        0.0,
        1.0,
        "the same, where a first or last line too many and asterisks are forgiven",
    ),
    Metric("length_ratio", None, 0.0, None, "words of the answer for each word of the reference"),
    Metric(
        "verbose",
        False,
        0.0,
        1.0,
        f"share of answers of more than {VERBOSE_TIMES} times the reference's words and more than {VERBOSE_WORDS}",
    ),
    Metric("repetition", False, 0.0, 1.0, "share of answers that say the same over and over"),
    Metric("unfinished", False, 0.0, 1.0, "share of answers that did not end by themselves"),
)


def behaviour_probe() -> Probe:
    """Instructions where a prompt's checks have them, length where it has a reference, loops and ends for all."""
    return Probe("behaviour", METRICS, _score, check=_check, explain=_explain)


def _check(prompt: Prompt) -> None:
    if CHECKS in prompt.checks:
        instructions_of(prompt)


def _explain(prompt: Prompt, answer: Answer) -> list[str]:
    return broken(prompt, answer.spoken) if CHECKS in prompt.checks else []


def _score(prompt: Prompt, answer: Answer) -> dict[str, float]:
    found = {"unfinished": float(not answer.finished)}
    reference = None if "tool_calls" in prompt.checks else prompt.reference
    if reference is None or not loops(reference):
        found["repetition"] = float(loops(answer.text))
    if reference is not None and (wanted := len(words_of(reference))):
        given = len(words_of(answer.spoken))
        found["length_ratio"] = given / wanted
        found["verbose"] = float(given > VERBOSE_TIMES * wanted and given > VERBOSE_WORDS)
    if CHECKS in prompt.checks:
        found |= instruction_scores(prompt, answer.spoken)
    return found


def loops(text: str) -> bool:
    """Whether the same words stand four times or more in a row, 20 words together; or the answer ends in 100 signs or
    line ends that repeat. Looks at the last 20,000 characters."""
    tokens, is_word = _tokens(text[-LOOKED_AT:])
    return any(
        _is_loop(is_word[start:end], unit, ends=end == len(tokens))
        for unit in range(1, min(LONGEST_UNIT, len(tokens) // REPEATS) + 1)
        for start, end in _repeated(tokens, unit)
    )


def _is_loop(is_word: NDArray[np.bool_], unit: int, *, ends: bool) -> bool:
    if is_word[:unit].any():
        return int(is_word.sum()) >= LOOP_WORDS
    return ends and len(is_word) >= LOOP_SIGNS


def _repeated(tokens: NDArray[np.int64], unit: int) -> list[tuple[int, int]]:
    """Where (start, end) `unit` tokens stand `REPEATS` times or more in a row."""
    same = np.concatenate(([False], tokens[unit:] == tokens[:-unit], [False]))
    edges = np.flatnonzero(same[1:] != same[:-1])
    starts, ends = edges[::2], edges[1::2] + unit
    long = ends - starts >= REPEATS * unit
    return list(zip(starts[long].tolist(), ends[long].tolist(), strict=True))


def _tokens(text: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Words, signs and line ends as numbers that are equal where they are, and which of them are words."""
    found: list[tuple[str, bool]] = []
    for word, sign in words_and_signs(text):
        if len(word) > LONGEST_WORD:
            found += [(letter, True) for letter in word]
        else:
            found.append((word or sign, bool(word)))
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(token, len(numbers)) for token, _ in found]
    return np.array(ids, np.int64), np.array([is_word for _, is_word in found], np.bool_)
