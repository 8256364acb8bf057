"""Rules on an answer's text that a program can verify, in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911).

Each takes what the contract says and gives a check: a function from an answer to its breaches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from json import JSONDecodeError
from typing import Any

import regex

from sftdist.data.jsonline import decode_embedded
from sftdist.data.language import language_of, languages
from sftdist.data.rowerror import RowError, show

PATTERN_SECONDS = 5.0  # of processor time for one pattern on one answer; a sane one takes microseconds
SHOWN = 30  # characters of an answer's begin and end
_END = re.compile(r"[.!?\u2026]+(?=[\s\"'\u201d\u2019)\]])|[\u3002\uff01\uff1f\u0964]+")
_MARKER = re.compile(r"^\s*(?:\d+[.)]|[-*+\u2022])\s+")
_NO_TEXT = "\"'\u201d\u2019)] \t"
# What others call it.
MEANT = {
    "max_length": "max_characters",
    "min_length": "min_characters",
    "max_chars": "max_characters",
    "min_chars": "min_characters",
    "pattern": "required",
    "regex": "required",
    "must_match": "required",
    "must_not_match": "forbidden",
    "json": "json_only",
    "enum": "one_of",
    "lang": "language",
    "prefix": "starts_with",
    "suffix": "ends_with",
}


@dataclass(frozen=True, slots=True)
class Breach:
    """A rule that an answer breaks. `rule` is its place in the contract, which equal breaches share."""

    rule: str
    given: str
    required: str

    def __str__(self) -> str:
        return f"{self.rule}: given {self.given}, required {self.required}"


Check = Callable[[str], Iterator[Breach]]


class Fault(ValueError):
    """A value that a rule cannot take; the text goes on where the name of the rule ends."""

    def __init__(self, text: str, at: str = "") -> None:
        super().__init__(f"{at}: {text}")


class TooSlow(Exception):
    """A pattern that takes too long on an answer: the text says which."""


# --- counting -----------------------------------------------------------------------------------------


def words_in(text: str) -> int:
    """What blanks separate."""
    return len(text.split())


def sentences_in(text: str) -> int:
    """What an end mark or the end of a line ends. The mark of a list (`2.`) ends nothing; `Dr. No` counts as two."""
    return sum(_sentences_in_line(_MARKER.sub("", line, count=1)) for line in text.splitlines())


def _sentences_in_line(line: str) -> int:
    return sum(bool(part.strip(_NO_TEXT)) for part in _END.split(line))


def paragraphs_in(text: str) -> int:
    """What empty lines separate."""
    lines = [bool(line.strip()) for line in text.splitlines()]
    return sum(here and not before for before, here in zip([False, *lines], lines, strict=False))


UNITS: dict[str, Callable[[str], int]] = {
    "characters": len,
    "words": words_in,
    "sentences": sentences_in,
    "paragraphs": paragraphs_in,
}


def _at_least(unit: str, value: Any) -> Check:
    return _counted(f"rules.min_{unit}", unit, "least", whole_number(value))


def _at_most(unit: str, value: Any) -> Check:
    return _counted(f"rules.max_{unit}", unit, "most", whole_number(value))


def _counted(rule: str, unit: str, which: str, limit: int) -> Check:
    def check(answer: str) -> Iterator[Breach]:
        found = UNITS[unit](answer)
        if (found < limit) if which == "least" else (found > limit):
            yield Breach(rule, f"{found:,} {unit}", f"at {which} {limit:,}")

    return check


def whole_number(value: Any, at: str = "") -> int:
    """A count that a rule names. Raises `Fault`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Fault(f"given {show(value)}, required a whole number of at least 0", at)
    return value


# --- what an answer is ----------------------------------------------------------------------------------


def parse_json(answer: str) -> tuple[Any, str | None]:
    """The value of an answer that is JSON and nothing else, or what is wrong with it."""
    try:
        return decode_embedded(answer, "$"), None
    except JSONDecodeError as problem:
        return None, f"{problem.msg} at character {problem.pos + 1}: {show(answer[problem.pos : problem.pos + 40])}"
    except RowError as problem:
        return None, f"{problem.given} at {problem.field}"


def _json_only(value: Any) -> Check:
    def check(answer: str) -> Iterator[Breach]:
        if value and (wrong := parse_json(answer)[1]) is not None:
            yield Breach("rules.json_only", wrong, "JSON and nothing else")

    if not isinstance(value, bool):
        raise Fault(f"given {show(value)}, required true or false")
    return check


def _language(value: Any) -> Check:
    wanted = texts_of(value)
    for at, code in wanted.items():
        if code not in languages():
            raise Fault(f"given {show(code)}, required the ISO 639 code of a language, such as en, de or zh", at)
    codes = frozenset(wanted.values())

    def check(answer: str) -> Iterator[Breach]:
        found = language_of(answer)
        if found is not None and found not in codes:
            yield Breach("rules.language", f"{found}: {show(answer, 40)}", " or ".join(wanted.values()))

    return check


def _edge(rule: str, value: Any) -> Check:
    """starts_with and ends_with; outer white space of the answer does not count."""
    texts = tuple(texts_of(value).values())
    starts = rule == "starts_with"

    def check(answer: str) -> Iterator[Breach]:
        bare = answer.strip()
        if not (bare.startswith(texts) if starts else bare.endswith(texts)):
            part = bare[:40] if starts else bare[-40:]
            yield Breach(f"rules.{rule}", show(part), " or ".join(map(show, texts)))

    return check


def _one_of(value: Any) -> Check:
    texts = tuple(texts_of(value).values())

    def check(answer: str) -> Iterator[Breach]:
        if answer.strip() not in texts:
            yield Breach("rules.one_of", show(answer), " or ".join(map(show, texts)))

    return check


# --- patterns ---------------------------------------------------------------------------------------------


def _patterns(rule: str, value: Any) -> Check:
    """`required` must be found somewhere in the answer, `forbidden` nowhere."""
    compiled = {f"rules.{rule}{at}": _compiled(text, at) for at, text in texts_of(value).items()}

    def check(answer: str) -> Iterator[Breach]:
        for name, pattern in compiled.items():
            found = search(pattern, answer, name)
            if found and rule == "forbidden":
                where = f"{show(found.group())} at character {found.start() + 1}"
                yield Breach(name, where, f"nothing that matches {pattern.pattern}")
            elif not found and rule == "required":
                yield Breach(name, _ends(answer), f"something that matches {pattern.pattern}")

    return check


def _ends(text: str) -> str:
    """A text by how it begins and ends: patterns are often about one of these."""
    return show(text) if len(text) <= 2 * SHOWN else f"{show(text[:SHOWN])} ... {show(text[-SHOWN:])}"


def _compiled(text: str, at: str) -> regex.Pattern[str]:
    try:
        return regex.compile(text)
    except regex.error as problem:
        raise Fault(f"given {show(text)}, required a regular expression ({problem})", at) from None


def search(pattern: regex.Pattern[str], text: str, rule: str) -> regex.Match[str] | None:
    """The first match. A pattern that would run for minutes is stopped, which `re` cannot."""
    try:
        return pattern.search(text, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise TooSlow(
            f"{rule}: given {pattern.pattern}, which takes more than {PATTERN_SECONDS:g} s for an answer of "
            f"{len(text):,} characters ({show(text)}); required a pattern without repetition inside repetition, "
            "such as (a+)+"
        ) from None


# --- all of them --------------------------------------------------------------------------------------------


def texts_of(value: Any) -> dict[str, str]:
    """One text, or several: each by its place in a list."""
    several = {f"[{i}]": item for i, item in enumerate(value)} if isinstance(value, list) else {"": value}
    if not several:
        raise Fault("given an empty list, required a text or a list of them")
    for at, item in several.items():
        if not isinstance(item, str) or not item:
            advice = "; put it in quotes" if isinstance(item, int | float) else ""
            raise Fault(f"given {show(item)}, required text{advice}", at)
    return several


RULES: dict[str, Callable[[Any], Check]] = {
    **{f"min_{unit}": partial(_at_least, unit) for unit in UNITS},
    **{f"max_{unit}": partial(_at_most, unit) for unit in UNITS},
    "language": _language,
    "json_only": _json_only,
    "required": partial(_patterns, "required"),
    "forbidden": partial(_patterns, "forbidden"),
    "starts_with": partial(_edge, "starts_with"),
    "ends_with": partial(_edge, "ends_with"),
    "one_of": _one_of,
}


def unknown(key: str, known: Collection[str], meant: str | None = None) -> str:
    """The issue of a key that is none: the nearest one, else all of them."""
    near = meant or next(iter(get_close_matches(key, known, n=1, cutoff=0.7)), None)
    return f"{key}: unknown key; " + (f"did you mean {near}?" if near else f"required one of {', '.join(known)}")


def meant(key: str) -> str | None:
    """The rule that a key of another tool means."""
    return MEANT.get(key.lower())
