"""The words of a text in any script, for the metrics that count and compare them."""

from __future__ import annotations

from collections import deque

import regex

# Scripts that put no space between words: each character counts as a word, as chrF and MLQA's F1 do in effect.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_A_WORD = rf"[{UNSPACED}]\p{{M}}*|(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}])+"
_WORD = regex.compile(_A_WORD)
_WORD_OR_SIGN = regex.compile(rf"({_A_WORD})|(\n|\S)")
_ALONE = regex.compile(rf"([{UNSPACED}]\p{{M}}*)")
_LETTER = rf"(?:(?![{UNSPACED}])[\p{{L}}\p{{M}}\p{{N}}_])"
_IN_WORD = regex.compile(_LETTER)


def words_of(text: str) -> list[str]:
    """Runs of letters and digits in lower case, without punctuation; in ASCII the same words as rouge-score's."""
    return _WORD.findall(text.lower())


def words_and_signs(text: str) -> list[tuple[str, str]]:
    """(word, "") and ("", sign or line end), in order."""
    return _WORD_OR_SIGN.findall(text.lower())


def spaced(text: str) -> str:
    """The text with white space around each character of a script that has none between words."""
    return _ALONE.sub(r" \1 ", text)


def whole_word(text: str) -> str:
    """The expression that finds a word or phrase where it is no part of a longer word.

    Beside a character of a script without spaces it may stand anywhere.
    """
    before = rf"(?<!{_LETTER})" if _IN_WORD.match(text[:1]) else ""
    after = rf"(?!{_LETTER})" if _IN_WORD.match(text[-1:]) else ""
    return before + regex.escape(text) + after


def last(pattern: regex.Pattern[str], text: str) -> regex.Match[str] | None:
    """The last match of a pattern."""
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)
