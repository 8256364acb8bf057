"""Which of several choices an answer names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import regex

from sftdist.core.errors import DataError
from sftdist.data.rowerror import show
from sftdist.evals.probes.words import last, whole_word
from sftdist.evals.prompts import Prompt

Choices = Mapping[str, Sequence[str]]  # what each choice may be called; the first is its name

_NO_ARTICLE = r"(?!\s+\p{Ll})"  # "A dog barks" names no choice


def chosen(answer: str, choices: Choices) -> str | None:
    """The choice that an answer names: it is the whole answer, it begins it (`B) ...`), it stands behind the word
    answer, or it is the only one in the text. None where there is none or more than one.

    Choices of one letter count as they are written, others in any case.
    """
    names = {form.casefold(): name for name, forms in choices.items() for form in forms}
    whole, begins, behind, anywhere = _finders(tuple(form for forms in choices.values() for form in forms))
    found = whole.fullmatch(answer.strip()) or begins.match(answer.lstrip()) or last(behind, answer)
    if found is not None:
        return names[found["form"].casefold()]
    named = {names[form.casefold()] for form in anywhere.findall(answer)}
    return named.pop() if len(named) == 1 else None


@cache
def _finders(forms: tuple[str, ...]) -> tuple[regex.Pattern[str], ...]:
    """For a whole answer, its begin, behind the word answer, and anywhere; the longest form first."""
    ordered = sorted(forms, key=len, reverse=True)
    any_case = "|".join(whole_word(form) for form in ordered)
    as_written = "|".join(map(_as_written, ordered))
    no_article = "|".join(_as_written(form) + (_NO_ARTICLE if form in "AI" else "") for form in ordered)
    return (
        regex.compile(rf"(?i)\W{{0,8}}(?P<form>{any_case})\W{{0,8}}"),
        regex.compile(rf"\W{{0,8}}(?P<form>{as_written})(?:\s{{0,3}}(?:\Z|[.,:;!)\]*\n]))"),
        regex.compile(rf"(?i:\b(?:answer|choice|option))\s{{0,3}}(?i:is|:)?\W{{0,8}}(?P<form>{as_written})"),
        regex.compile(f"(?P<form>{no_article})"),
    )


def _as_written(form: str) -> str:
    return whole_word(form) if len(form) == 1 else f"(?i:{whole_word(form)})"


def choices_of(prompt: Prompt) -> Choices:
    """`checks.choices`: `["spam", "ham"]`, or `{"A": "Paris", "B": "Rome"}`, which may be called both ways. Raises
    DataError."""
    given = prompt.checks["choices"]
    if isinstance(given, list):
        given = {choice: choice for choice in given if isinstance(choice, str)} if len(given) > 1 else None
    if not isinstance(given, Mapping) or len(given) < 2 or not all(map(_is_text, [*given, *given.values()])):
        required = 'a list of at least two texts, or a mapping such as {"A": "Paris", "B": "Rome"}'
        raise DataError(f"{prompt.id}: checks.choices: given {show(prompt.checks['choices'])}, required {required}")
    return {name: tuple(dict.fromkeys((name, text))) for name, text in given.items()}


def right_choice(prompt: Prompt) -> str:
    """The choice that the reference names. Raises DataError."""
    choices = choices_of(prompt)
    right = None if prompt.reference is None else chosen(prompt.reference, choices)
    if right is None:
        given = f"{prompt.id}: reference: given {show(prompt.reference)}"
        raise DataError(f"{given}, required one of checks.choices: {', '.join(choices)}")
    return right


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
