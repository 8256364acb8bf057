"""The kinds of instructions: functions from what an instruction names to a check of answers.

The rules of contracts are kinds, each with a `value`. Most of the others are those of IFEval (Zhou et al. 2023,
arXiv:2311.07911); the parameters of their functions are what they take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import regex

from sftdist.data.answer_rules import RULES, Breach, Check, Fault, texts_of, whole_number
from sftdist.data.rowerror import show
from sftdist.evals.probes.words import whole_word

_CAPITAL = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:[-'\u2019][\p{L}\p{M}\p{N}]+)*")
_BULLET = regex.compile(r"(?m)^[ \t]*[-*+\u2022][ \t]+\S")
_PLACEHOLDER = regex.compile(r"\[[^\[\]\n]+\]")
_HIGHLIGHT = regex.compile(r"\*\*[^\n*]*[^\s*][^\n*]*\*\*|\*[^\n*]*[^\s*][^\n*]*\*")
_TITLE = regex.compile(r"<<[^<>\n]*[^<>\s][^<>\n]*>>")
_EMPTY_LINES = regex.compile(r"\n[^\S\n]*\n")
_COMMAS = ",\uff0c\u3001\u060c"  # of Chinese, Japanese and Arabic, too
_QUOTES = (('"', '"'), ("\u201c", "\u201d"), ("\u201e", "\u201c"), ("\u00ab", "\u00bb"))


# --- counts --------------------------------------------------------------------------------------------------


def _capital_words(text: str) -> int:
    return sum(map(str.isupper, _CAPITAL.findall(text)))


def _matches(pattern: regex.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))


COUNTS: dict[str, Callable[[str], int]] = {
    "bullets": partial(_matches, _BULLET),
    "placeholders": partial(_matches, _PLACEHOLDER),
    "highlights": partial(_matches, _HIGHLIGHT),
    "capital_words": _capital_words,
}


def _counted(what: str, count: Callable[[str], int], at_least: Any, at_most: Any) -> Check:
    low, high = _bound("at_least", at_least), _bound("at_most", at_most)
    if low is None and high is None:
        raise Fault("given no bound, required at_least, at_most or both")
    if low is not None and high is not None and low > high:
        raise Fault(f"given {low}, required at most the {high} of at_most", ".at_least")

    def check(answer: str) -> Iterator[Breach]:
        found = count(answer)
        if low is not None and found < low:
            yield Breach(what, f"{found:,}", f"at least {low:,}")
        elif high is not None and found > high:
            yield Breach(what, f"{found:,}", f"at most {high:,}")

    return check


def _bound(name: str, value: Any) -> int | None:
    return None if value is None else whole_number(value, f".{name}")


def _count_of(what: str, *, at_least: Any = None, at_most: Any = None) -> Check:
    return _counted(what, COUNTS[what], at_least, at_most)


def _word_count(*, word: Any, at_least: Any = None, at_most: Any = None) -> Check:
    pattern = _word(_text("word", word))
    return _counted(f"word_count of {show(word)}", partial(_matches, pattern), at_least, at_most)


def _letter_count(*, letter: Any, at_least: Any = None, at_most: Any = None) -> Check:
    wanted = _text("letter", letter).lower()
    if len(wanted) != 1:
        raise Fault(f"given {show(letter)}, required one letter", ".letter")
    return _counted(f"letter_count of {wanted}", lambda answer: answer.lower().count(wanted), at_least, at_most)


def _sections(*, marker: Any = "Section", at_least: Any = None, at_most: Any = None) -> Check:
    """Lines that begin with the marker and a number."""
    pattern = regex.compile(rf"(?m)^[ \t#*_]*{regex.escape(_text('marker', marker))}[ \t]*\d+")
    return _counted("sections", partial(_matches, pattern), at_least, at_most)


# --- words ---------------------------------------------------------------------------------------------------


def _includes(*, value: Any) -> Check:
    """Every word or phrase, in any case, not as a part of a longer word."""
    return partial(_words, "includes", {word: _word(word) for word in texts_of(value).values()}, True)


def _excludes(*, value: Any) -> Check:
    return partial(_words, "excludes", {word: _word(word) for word in texts_of(value).values()}, False)


def _words(rule: str, patterns: Mapping[str, regex.Pattern[str]], wanted: bool, answer: str) -> Iterator[Breach]:
    for word, pattern in patterns.items():
        if (pattern.search(answer) is not None) != wanted:
            with_or_without = ("without", "with") if wanted else ("with", "without")
            yield Breach(rule, f"{with_or_without[0]} {show(word)}", f"{with_or_without[1]} it")


def _word(text: str) -> regex.Pattern[str]:
    return regex.compile(whole_word(text), regex.IGNORECASE)


def _first_word(*, word: Any, paragraph: Any = 1) -> Check:
    """The first word of a paragraph (from 1; empty lines separate them), in any case and without what is around it."""
    wanted, place = _text("word", word).casefold(), whole_number(paragraph, ".paragraph")
    if not place:
        raise Fault(f"given {show(paragraph)}, required a whole number of at least 1", ".paragraph")

    def check(answer: str) -> Iterator[Breach]:
        paragraphs = [part for part in _EMPTY_LINES.split(answer) if part.strip()]
        first = paragraphs[place - 1].split(maxsplit=1)[0] if len(paragraphs) >= place else ""
        if first.strip("\"'\u201c\u201d\u2018\u2019.,:;?!*_()#").casefold() != wanted:
            yield Breach("first_word", show(first), show(word))

    return check


def _repeats(*, value: Any) -> Check:
    """The answer begins with a text, in any case, such as the question."""
    wanted = _text("value", value).strip().casefold()

    def check(answer: str) -> Iterator[Breach]:
        if not answer.strip().casefold().startswith(wanted):
            yield Breach("repeats", show(answer.strip()), f"{show(value)} first")

    return check


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Fault(f"given {show(value)}, required text", f".{name}")
    return value


# --- the form of the whole answer ------------------------------------------------------------------------------


def _form(rule: str, required: str, fulfilled: Callable[[str], bool]) -> Check:
    def check(answer: str) -> Iterator[Breach]:
        if not fulfilled(answer.strip()):
            yield Breach(rule, show(answer), required)

    return check


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and (text[0], text[-1]) in _QUOTES


def _postscript(*, marker: Any = "P.S.") -> Check:
    """A line that begins with the marker and goes on; blanks inside the marker do not count."""
    wanted = "".join(_text("marker", marker).split()).casefold()

    def fulfilled(answer: str) -> bool:
        lines = ("".join(line.strip(" \t*_").split()).casefold() for line in answer.splitlines())
        return any(line.startswith(wanted) and len(line) > len(wanted) for line in lines)

    return _form("postscript", f"a line that begins with {marker}", fulfilled)


def _parts(*, exactly: Any, divider: Any = "***", different: Any = False) -> Check:
    """Parts between dividers, none of them empty; `different`: no two are the same."""
    mark, wanted = _text("divider", divider), whole_number(exactly, ".exactly")

    def fulfilled(answer: str) -> bool:
        parts = [part.strip() for part in answer.split(mark)]
        # a divider above the first part or below the last separates nothing
        parts = parts[1:] if len(parts) > 1 and not parts[0] else parts
        parts = parts[:-1] if len(parts) > 1 and not parts[-1] else parts
        return all(parts) and len(parts) == wanted and not (different and len(set(parts)) < len(parts))

    if not isinstance(different, bool):
        raise Fault(f"given {show(different)}, required true or false", ".different")
    what = f"{wanted} parts with {mark} between them" + (", all different" if different else "")
    return _form("parts", what, fulfilled)


KINDS: dict[str, Callable[..., Check]] = {
    **{name: partial(lambda make, *, value: make(value), make) for name, make in RULES.items()},
    "json_only": lambda: RULES["json_only"](True),
    **{name: partial(_count_of, name) for name in COUNTS},
    "word_count": _word_count,
    "letter_count": _letter_count,
    "sections": _sections,
    "includes": _includes,
    "excludes": _excludes,
    "first_word": _first_word,
    "repeats": _repeats,
    "postscript": _postscript,
    "parts": _parts,
    "no_commas": lambda: _form("no_commas", "no comma", lambda text: not any(comma in text for comma in _COMMAS)),
    "upper_case": lambda: _form("upper_case", "capital letters only", str.isupper),
    "lower_case": lambda: _form("lower_case", "small letters only", str.islower),
    "title": lambda: _form("title", "a title such as <<My day>>", lambda text: _TITLE.search(text) is not None),
    "quoted": lambda: _form("quoted", "double quotation marks around it", _is_quoted),
}
