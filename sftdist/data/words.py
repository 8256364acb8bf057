"""ASCII text through a byte-level BPE, word by word and from memory: the same ids as the Rust tokenizer, sooner.

Such a tokenizer cuts a text at its added tokens, then into words by a regular expression, and merges bytes inside each
word alone; so the ids of a word never change and are kept. For ASCII text the expression needs no Unicode tables and
Python's own `re` finds the words in a tenth of the time that the full tokenizer takes. Any other text, and any
tokenizer that is not exactly of this kind, goes the plain way; each tokenizer is compared with it once, on all pairs of
characters, before this path is used at all.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import Model
from tokenizers.pre_tokenizers import ByteLevel

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ONE_DIGIT = _GPT4.replace("{1,3}", "")
# The expressions of GPT-2, Llama 3 (and GPT-4), Qwen (and our own vocabularies) as they are over ASCII.
PATTERNS = {
    _GPT2: r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^ \t-\rA-Za-z0-9]+|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+",
    _GPT4: (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^ \t-\rA-Za-z0-9]+[\r\n]*"
        r"|[ \t-\r]*[\r\n]+|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+"
    ),
}
PATTERNS[_ONE_DIGIT] = PATTERNS[_GPT4].replace("{1,3}", "")
MAX_WORDS = 1_000_000  # kept ones, some hundred bytes each
MAX_WORD = 200  # longer ones (base64, minified code) hardly come back


Word = tuple[tuple[int, ...], tuple[int, ...]]  # ids, and the characters of each


class WordEncoding:
    """The part of `tokenizers.Encoding` that finding spans needs; one character is one byte here."""

    def __init__(self, words: list[Word]) -> None:
        self._words = words
        self.ids: list[int] = list(chain.from_iterable(map(itemgetter(0), words)))

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(chain.from_iterable(map(itemgetter(1), self._words)), initial=0))

    def char_to_token(self, char: int) -> int | None:
        token = bisect_right(self._starts, char) - 1
        return token if 0 <= token < len(self.ids) else None

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self._starts[token], self._starts[token + 1]


class _Known(dict[str, Word]):
    """Words that were merged before; a new one is merged when it is asked for."""

    def __init__(self, model: Model) -> None:
        self._model, self._bytes = model, ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> Word:
        tokens = self._model.tokenize(self._bytes.pre_tokenize_str(word)[0][0])
        found = tuple(t.id for t in tokens), tuple(len(t.value) for t in tokens)
        if len(self) >= MAX_WORDS:
            self.clear()
        if len(word) <= MAX_WORD:
            self[word] = found
        return found


class Words:
    """The words of one tokenizer and their ids."""

    def __init__(self, backend: Tokenizer, words: re.Pattern[str], added: Mapping[str, int]) -> None:
        self._find_words, self._known = words.findall, _Known(backend.model)
        # The longest first: what the Rust side finds where one added token is the beginning of another.
        texts = sorted((text for text in added if text.isascii()), key=len, reverse=True)
        self._added: dict[str, Word] = {text: ((added[text],), (len(text),)) for text in texts}
        self._cut = re.compile(f"({'|'.join(map(re.escape, texts)) or '(?!)'})").split

    @classmethod
    def of(cls, backend: Tokenizer, state: Mapping[str, Any]) -> Words | None:
        """None where the tokenizer is not of the kind; `state` is its JSON."""
        pattern = _pattern(state)
        plain = [not (t["lstrip"] or t["rstrip"] or t["single_word"]) for t in state["added_tokens"]]
        one_pass = len({t["normalized"] for t in state["added_tokens"]}) <= 1
        if pattern is None or not _is_plain_bpe(state) or not all(plain) or not one_pass:
            return None
        added = {t["content"]: t["id"] for t in state["added_tokens"]}
        words = cls(backend, re.compile(PATTERNS[pattern]), added)
        return words if words._agrees(backend) else None

    def encode(self, text: str) -> WordEncoding:
        """The encoding of an ASCII text."""
        found: list[Word] = []
        for i, piece in enumerate(self._cut(text)):
            if i % 2:
                found.append(self._added[piece])
            else:
                found += map(self._known.__getitem__, self._find_words(piece))
        return WordEncoding(found)

    def _agrees(self, backend: Tokenizer) -> bool:
        """Whether both ways give the same ids and places on every pair of ASCII characters and around added tokens."""
        characters = [chr(i) for i in range(128)]
        short = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
        texts = ["".join(a + b for b in characters) for a in characters]
        texts += [f"x{form}{after}" for word in short for form in (word, word.upper()) for after in ("", " ", "y", "9")]
        texts += [f"{a}{a}{token}{b}{token}{a}12345" for token in self._added for a in "\n .a" for b in "\n .a"]
        for text, plain in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
            found = self.encode(text)
            places = [found.token_to_chars(i) for i in range(len(found.ids))]
            if found.ids != plain.ids or places != plain.offsets:
                return False
        return True


def _pattern(state: Mapping[str, Any]) -> str | None:
    """The expression that a tokenizer's pre-tokenizer cuts words with, if it is a known one used in the known way."""
    pre = state["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return _GPT2 if last["use_regex"] else None
    split = steps[0]
    known = len(steps) == 2 and split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    pattern = split["pattern"].get("Regex") if known and not last["use_regex"] else None
    return pattern if pattern in PATTERNS else None


def _is_plain_bpe(state: Mapping[str, Any]) -> bool:
    model = state["model"]
    special = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    composed = state["normalizer"] is None or state["normalizer"]["type"] == "NFC"  # NFC leaves ASCII as it is
    return model["type"] == "BPE" and not any(model.get(key) for key in special) and composed
