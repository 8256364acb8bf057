"""Instructions that a program can verify, in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911).

A prompt's `checks.instructions` is a list of objects such as `{"kind": "max_words", "value": 100}`, see
`probes.instruction_kinds`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sftdist.core.errors import DataError
from sftdist.data.answer_rules import Check, Fault, TooSlow, meant, unknown
from sftdist.data.rowerror import show
from sftdist.evals.probes.instruction_kinds import KINDS
from sftdist.evals.prompts import Prompt

CHECKS = "instructions"


def instructions_of(prompt: Prompt) -> list[Check]:
    """The checks behind `checks.instructions`. Raises DataError for a kind or an argument that there is not."""
    given = prompt.checks[CHECKS]
    if not isinstance(given, list) or not given:
        example = '[{"kind": "max_words", "value": 100}]'
        raise DataError(f"{prompt.id}: checks.{CHECKS}: given {show(given)}, required a list such as {example}")
    return [_instruction(one, f"{prompt.id}: checks.{CHECKS}[{place}]") for place, one in enumerate(given)]


def _instruction(given: Any, where: str) -> Check:
    if not isinstance(given, Mapping) or not isinstance(given.get("kind"), str):
        raise DataError(f"{where}: given {show(given)}, required an object with kind")
    kind = given["kind"]
    if kind not in KINDS:
        raise DataError(f"{where}.kind: {unknown(kind, KINDS, meant(kind))}")
    arguments = {str(name): value for name, value in given.items() if name != "kind"}
    try:
        inspect.signature(KINDS[kind]).bind(**arguments)
    except TypeError as problem:
        takes = ", ".join(inspect.signature(KINDS[kind]).parameters) or "nothing"
        raise DataError(f"{where}: {kind}: {problem}; it takes {takes}") from None
    try:
        return KINDS[kind](**arguments)
    except Fault as fault:
        raise DataError(f"{where}: {kind}{fault}") from None


def follows(check: Check, answer: str) -> bool:
    """Whether an answer follows an instruction; an empty one follows none."""
    return bool(answer.strip()) and next(iter(check(answer)), None) is None


def follows_loosely(check: Check, answer: str) -> bool:
    """Whether the answer follows, or what is left without its first line, its last line or asterisks (IFEval, 2.3)."""
    return any(follows(check, variant) for variant in variants(answer))


def variants(answer: str) -> list[str]:
    """The answer as it is and without its first line, last line or both, each with and without asterisks."""
    lines = answer.split("\n")
    parts = [answer, *("\n".join(lines[cut]).strip() for cut in (slice(1, None), slice(-1), slice(1, -1)))]
    return list(dict.fromkeys([*parts, *(part.replace("*", "") for part in parts)]))


def broken(prompt: Prompt, answer: str) -> list[str]:
    """What an answer does not follow, in words."""
    if not answer.strip():
        return ["given an empty answer"]
    return [str(breach).removeprefix("rules.") for check in instructions_of(prompt) for breach in check(answer)]


def instruction_scores(prompt: Prompt, answer: str) -> dict[str, float]:
    """1.0 where every instruction is followed. Raises DataError for a pattern that takes too long."""
    checks = instructions_of(prompt)
    try:
        return {
            "instructions_strict": float(all(follows(check, answer) for check in checks)),
            "instructions_loose": float(all(follows_loosely(check, answer) for check in checks)),
        }
    except TooSlow as problem:
        raise DataError(f"{prompt.id}: checks.{CHECKS}: {problem}") from None
