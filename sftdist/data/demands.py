"""Instructions that can be checked on the answer: "be concise" and 900 words. English ones; a sign, not a proof."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from sftdist.data.answer_rules import sentences_in, words_in
from sftdist.data.style import layout_of

CONCISE_WORDS = 300  # an answer that is to be concise and has more is not
TOLERANCE = 1.25  # who is asked for 100 words may write 120
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "ten": 10}
_AT_MOST = (
    r"(?:at most|no more than|not more than|up to|a maximum of|max(?:imum)?|less than|fewer than|under|within|in)"
)
_NUMBER = rf"(\d{{1,4}}|{'|'.join(NUMBERS)})"
_TELLS = r"(?:answer|reply|respond|response|output|write|return|explain|summari[sz]e|describe|keep|be|use|as|in)"


class Demand(NamedTuple):
    """An instruction that was found; `broken` tells whether an answer contradicts it."""

    name: str
    broken: Callable[[str], bool]


def _number(text: str) -> int:
    return NUMBERS.get(text) or int(text)


def _concise(_: re.Match[str]) -> Callable[[str], bool]:
    return lambda answer: words_in(answer) > CONCISE_WORDS


def _words(found: re.Match[str]) -> Callable[[str], bool]:
    limit = TOLERANCE * _number(found.group(1))
    return lambda answer: words_in(answer) > limit + 2


def _sentences(found: re.Match[str]) -> Callable[[str], bool]:
    limit = TOLERANCE * _number(found.group(1))
    return lambda answer: sentences_in(answer) > limit + 1


def _json(_: re.Match[str]) -> Callable[[str], bool]:
    return lambda answer: answer.lstrip()[:1] not in ("{", "[") and "```" not in answer


def _plain(_: re.Match[str]) -> Callable[[str], bool]:
    return lambda answer: not layout_of(answer).isdisjoint(("headings", "bold", "tables"))


def _bullets(_: re.Match[str]) -> Callable[[str], bool]:
    return lambda answer: "\n" not in answer.strip()


def _yes_or_no(_: re.Match[str]) -> Callable[[str], bool]:
    return lambda answer: words_in(answer) > 3


# A word that must be there, which is quickly seen; how the instruction reads in lower case; what contradicts it.
DEMANDS: dict[str, tuple[str, re.Pattern[str], Callable[[re.Match[str]], Callable[[str], bool]]]] = {
    "be concise": ("concise", re.compile(rf"\b{_TELLS}\b.{{0,40}}\bconcise"), _concise),
    "be brief": (
        "brief",
        re.compile(r"\b(?:be|keep .{0,30}|answer|reply|respond|explain|summari[sz]e) brief"),
        _concise,
    ),
    "at most n words": (" word", re.compile(rf"\b{_AT_MOST} {_NUMBER} words?\b"), _words),
    "at most n sentences": (" sentence", re.compile(rf"\b{_AT_MOST} {_NUMBER} sentences?\b"), _sentences),
    "JSON": (
        "json",
        re.compile(r"\b(?:answer|reply|respond)\b.{0,30}\bjson\b|\bjson only\b|\bonly (?:valid )?json\b"),
        _json,
    ),
    "no markdown": ("markdown", re.compile(r"\b(?:no|without|do not use|don't use|avoid) markdown"), _plain),
    "plain text": ("plain text", re.compile(r"\b(?:in|as|only|use) plain text\b"), _plain),
    "bullet points": (
        "bullet",
        re.compile(r"\b(?:in|as|use|using|with) (?:\w+ )?bullet(?:ed)?[ -](?:points?|list)"),
        _bullets,
    ),
    "yes or no": ("yes or no", re.compile(r"\b(?:answer|reply|respond)\b.{0,20}\byes or no\b(?! and)"), _yes_or_no),
}
LOOKED_AT = 4000  # characters of a prompt: what stands far inside a pasted document is no instruction


def demands_in(text: str) -> Iterator[Demand]:
    """The instructions in a system prompt or a question."""
    text = text[:LOOKED_AT].lower()
    for name, (word, pattern, make) in DEMANDS.items():
        if word in text and (found := pattern.search(text)):
            yield Demand(name, make(found))


@lru_cache(maxsize=4096)
def standing_demands(text: str) -> tuple[Demand, ...]:
    """Those of a system prompt, of which a source has few."""
    return tuple(demands_in(text))
