"""What the style of an answer shows at a glance: how it opens, closes, and is laid out. English words, any layout."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

OPENINGS = {
    "greeting": ("hello", "hi", "hey", "dear", "greetings", "welcome", "good"),
    "agreement": ("sure", "certainly", "absolutely", "of", "okay", "ok", "great", "alright", "gladly"),
    "apology": ("sorry", "unfortunately", "apologies", "i'm", "i\u2019m", "i"),
}
# Where the first word alone does not tell.
GO_ON = {
    "good": ("morning", "afternoon", "evening", "day"),
    "of": ("course",),
    "great": ("question", "idea", "choice"),
    "i'm": ("sorry", "afraid"),
    "i\u2019m": ("sorry", "afraid"),
    "i": ("apologize", "apologise"),
}
OPENING_OF = {word: name for name, words in OPENINGS.items() for word in words}
OPENED = 40  # characters that are looked at
CLOSINGS = ("let me know", "hope this helps", "hope that helps", "feel free", "anything else", "happy to help")
CLOSED = 160
LINE_STARTS = re.compile(r"\n(?:(?P<headings>#{1,4} )|(?P<bullets>[-*\u2022] )|(?P<numbered>1[.)] )|(?P<tables>\|))")
LAYOUT = ("headings", "bullets", "numbered", "tables", "bold", "code blocks")
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")
# Signs of a tone: an answer of a steady voice has them, or has not. Layout depends on the question as well.
TONE = ("greeting", "agreement", "apology", "closing phrase", "exclamation", "emoji", "names itself an AI")
SIGNS = (*TONE, *LAYOUT)
ENDS = {
    **dict.fromkeys(".!?\u2026\u3002\uff01\uff1f\u0964\u061f", "a sentence mark"),
    **dict.fromkeys(")]}>\"'`\u201d\u2019*|;", "a bracket or quote"),
}
BUCKETS_PER_DOUBLING = 8


def signs_of(answer: str) -> Iterator[str]:
    """Those of SIGNS that an answer shows."""
    if opening := _opening(answer[:OPENED]):
        yield opening
    tail = answer[-CLOSED:].lower()
    if any(phrase in tail for phrase in CLOSINGS):
        yield "closing phrase"
    if "!" in answer and ("! " in answer or "!\n" in answer or answer.endswith("!")):
        yield "exclamation"
    if not answer.isascii() and EMOJI.search(answer):
        yield "emoji"
    if " an AI " in answer or " an AI," in answer or "AI language model" in answer:
        yield "names itself an AI"
    yield from layout_of(answer)


def layout_of(answer: str) -> set[str]:
    """Those of LAYOUT."""
    text = "\n" + answer if answer[:1] in "#-*\u20221|" else answer
    found = {str(line.lastgroup) for line in LINE_STARTS.finditer(text)} if "\n" in text else set[str]()
    if "**" in answer:
        found.add("bold")
    if "```" in answer:
        found.add("code blocks")
    return found


def _opening(start: str) -> str | None:
    words = start.lower().split(None, 2)
    if not words:
        return None
    first = words[0].rstrip(",.!:;")
    name = OPENING_OF.get(first)
    if name is None or first not in GO_ON:
        return name
    second = words[1].rstrip(",.!:;?") if len(words) > 1 else ""
    return name if second in GO_ON[first] else None


def end_of(answer: str) -> str:
    """What kind of character an answer ends with."""
    last = answer.rstrip()[-1:]
    if last in ENDS:
        return ENDS[last]
    return "a letter" if last.isalpha() else "a digit" if last.isdigit() else "something else"


def bucket(words: int) -> int:
    """The bar of a histogram of lengths: eight for each doubling."""
    return round(BUCKETS_PER_DOUBLING * math.log2(max(words, 1)))


def words_at(bar: float) -> float:
    """About how many words a bar stands for."""
    return 2.0 ** (bar / BUCKETS_PER_DOUBLING)
