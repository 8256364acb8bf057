"""Answers that seem to be cut off or empty, told by what a finished text does not do.

Each sign is one that finished answers seldom show; what merely looks unusual is none. An answer that was cut between
two sentences, in a first sentence, or in code outside of brackets cannot be told from a finished one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sftdist.core.settings import TrainOn
from sftdist.data.answers import trained_answers
from sftdist.data.rowerror import show
from sftdist.data.schema import Conversation

DOUBTS_VERSION = 1  # grows whenever another doubt may be raised about an answer
EMPTY = "nothing is said"
FENCE = "a code fence is not closed"
GOES_ON = "the last character announces more"
MARKER = "the last line is the mark of a list alone"
THOUGHT = "a thought is not closed"
BRACKET = "a bracket is not closed"
TABLE = "the last row of a table is not closed"
WORD = "the last word announces more"
QUOTE = "a quotation is not closed"
SENTENCE = "the last sentence does not end, others do"

NOTHING = re.compile(r"[\s.\u2026\-\u2013\u2014_*#`~,;:\u200b-\u200f\u2060\ufeff]*")
ANNOUNCES = tuple(",:([{\u201c\u00ab\uff0c\u3001\uff1a\uff08\u300c")
MARKS = tuple(".!?\u2026\u3002\uff01\uff1f\u0964\u061f\u06d4")  # with one at its end a text is whole, open or not
LIST_MARK = re.compile(r"\s*(?:\d{1,3}[.)]|[-*+\u2022])")
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))
FACES = re.compile(r"[:;=]['\u2019]?-?[(\[{]")
FACE_AT_END = re.compile(FACES.pattern + r"\Z")
# Words that no sentence ends with, in the languages that most answers are in.
UNFINISHED = frozenset(
    re.findall(
        r"\w+",
        """the a an and or of because your my their our its than into whose every
        der das und oder ein eine einen mit von
        el los las del una unos para por
        et ou des une aux dans avec
        gli della dello degli uno nella""",
    )
)
# A mark after a word, not after the number of a list, and more behind it.
SENTENCE_END = re.compile(
    "(?<=[^\\W_])(?<!\\b\\d)(?<!\\b\\d\\d)[.!?\u2026\u0964\u061f\u06d4]+[\"'\u201d\u2019)\\]*_]*\\s+(?=[^\\W_a-z])"
    "|[\u3002\uff01\uff1f](?=\\S)"
)
CLOSING = re.compile(
    r"[-\u2013\u2014~]|(?:best|cheers|kind|love|regards|respectfully|sincerely|warm|warmly|yours)\b", re.I
)
SIGNATURE_WORDS = 8
SHOWN = 50  # characters


class Doubt(NamedTuple):
    """Why the answer of an assistant turn (from 0) seems cut off or empty, and how it ends."""

    turn: int
    reason: str
    end: str

    def __str__(self) -> str:
        return f"assistant turn {self.turn}: {self.reason}: {show(self.end)}"


def doubts(conversation: Conversation, train_on: TrainOn) -> list[Doubt]:
    """The doubts about the trained answers of a conversation; mostly none."""
    return [
        Doubt(answer.turn, reason, answer.text[-SHOWN:])
        for answer in trained_answers(conversation, train_on)
        if (reason := doubt(answer.text)) is not None
    ]


def doubt(answer: str) -> str | None:
    """Why an answer seems cut off or empty, or None."""
    text = answer.rstrip()
    if NOTHING.fullmatch(text):
        return EMPTY
    if text.count("```") % 2:
        return FENCE
    if text.endswith("```"):
        return None
    if "<think>" in text and "</think>" not in text:
        return THOUGHT
    line = text[text.rfind("\n") + 1 :]
    if text.endswith(ANNOUNCES) and not FACE_AT_END.search(text, len(text) - 3):
        return GOES_ON
    if line != text and LIST_MARK.fullmatch(line):
        return MARKER
    if not text.endswith(MARKS) and any(text.count(a) > text.count(b) for a, b in PAIRS) and _is_open(text):
        return BRACKET
    if line.startswith("|") and not line.endswith("|") and "|\n" in text:
        return TABLE
    return _doubt_of_prose(text, line) if line[-1].isalpha() else None


def _is_open(text: str) -> bool:
    text = FACES.sub("", text)
    return any(text.count(opening) > text.count(closing) for opening, closing in PAIRS)


def _doubt_of_prose(text: str, line: str) -> str | None:
    """Doubts about a last line that ends in a letter."""
    words = line.split()
    if len(words) > 2 and words[-1] in UNFINISHED and words[-2].isalpha():
        return WORD
    if line.count('"') % 2 or text.count("`") % 2:
        return QUOTE
    end = 0
    for found in SENTENCE_END.finditer(line):
        end = found.end()
    return SENTENCE if end and not _is_signature(line[end:]) else None


def _is_signature(rest: str) -> bool:
    """`Best wishes, Ada` and `- Ada`: a letter ends with a name."""
    words = rest.split()
    if len(words) > SIGNATURE_WORDS or not words[-1][0].isupper():
        return False
    return "," in rest or CLOSING.match(rest) is not None
