"""The words of a command line: which group or key each one sets, and what is wrong with those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from sftdist.core.advice import DASHES, Vocabulary, bare_words, in_a_row, option, several, unreadable
from sftdist.core.resolve import literal
from sftdist.core.typed import PEERS_NAMES


@dataclass
class Words:
    """The overrides, read: values by key, one choice per group, groups without that choice, and all issues."""

    groups: dict[str, str] = field(default_factory=dict)
    values: list[Override] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    issues: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """The last value that was given for a key, else None."""
        found = [word.value() for word in self.values if word.key_or_group == key and not word.is_delete()]
        return found[-1] if found else None

    def refuse(self, issue: str | None, group: str | None = None) -> None:
        """Note an issue, and the group that is left without its file: what only follows from that is not told."""
        self.issues += [] if issue is None else [issue]
        self.refused += [] if group is None else [group]


def read_words(overrides: Sequence[str], vocabulary: Vocabulary) -> Words:
    """Hydra's grammar for each word, and one issue for each fault, which says what was meant."""
    words, parser = Words(), OverridesParser.create()
    for text, *bare in _with_bare_words(overrides):
        if text[0] in DASHES:
            issue = option([text, *bare], vocabulary)
            words.refuse(issue, _group_of(issue, "", vocabulary))
            continue
        if _is_bare(text) or bare:
            _refuse_bare(words, text, bare, vocabulary)
        if _is_bare(text):
            continue
        try:
            word = parser.parse_override(text)
        except (HydraException, ValueError):  # Python reads no number of more than 4300 digits
            fault = unreadable(text, vocabulary)
            words.refuse(None if bare else fault, _group_of(fault, text.partition("=")[0], vocabulary))
            continue
        key = word.key_or_group
        if wrong := _issue(word, text, words, vocabulary):
            words.refuse(wrong, _group_of(wrong, key, vocabulary))
        elif key in vocabulary.groups and isinstance(word.value(), str | int) and not word.is_delete():
            words.groups[key] = str(word.value())
        else:
            words.values.append(word)
    _refuse_taken_apart(words, vocabulary)
    return words


def _with_bare_words(overrides: Sequence[str]) -> list[list[str]]:
    """Each word with those after it that have no key: most often the shell has split a value at its spaces."""
    chunks: list[list[str]] = []
    for text in filter(None, overrides):
        if chunks and _is_bare(text):
            chunks[-1].append(text)
        else:
            chunks.append([text])
    return chunks


def _is_bare(text: str) -> bool:
    key, equals, _ = text.partition("=")
    return text[0] not in f"{DASHES}~" and not (key and equals)


def _refuse_bare(words: Words, text: str, bare: Sequence[str], vocabulary: Vocabulary) -> None:
    given = [text, *bare] if _is_bare(text) else bare
    issue = bare_words(None if _is_bare(text) else text, given, vocabulary)
    words.refuse(issue, _group_of(issue, given[0], vocabulary))


def _group_of(issue: str, key: str, vocabulary: Vocabulary) -> str | None:
    """The group that a refused word was about."""
    key = "exp" if "exp=" in issue else key.lstrip("+")
    return key if key in vocabulary.groups else None


def _issue(word: Override, text: str, words: Words, vocabulary: Vocabulary) -> str | None:
    """What is wrong with a word that parses, or None."""
    key, value = word.key_or_group, text.partition("=")[2]
    if word.is_sweep_override():
        return several(key, value, vocabulary)
    if not key:
        return f"{text}: given nothing before '=', required key=value"
    if key == "parallel" or key.startswith(("hydra/", "hydra.")):
        return f"{key}: it belongs to a sweep; add -m, or remove it"
    if word.package is not None:
        return f"{text}: given @{word.package}, required {key}={value}: a group of conf fills the section of its name"
    if "/" in key and (group := key.rpartition("/")[2]) in vocabulary.groups:
        return f"{key}: unknown key; did you mean {group}={value}?"
    if key.partition(".")[0] == "mix":
        return "mix: unknown key; did you mean data.mix?"
    if PEERS_NAMES.get(key) == "exp":
        return f"{key}: unknown key; did you mean +exp={value}?"
    if key == "exp" and not isinstance(word.value(), str | int):
        return f"{text}: given no name, required +exp=NAME"
    if key == "exp" and words.groups.get("exp", value) != value:
        return f"exp: given {words.groups['exp']} and {value}, required one preset"
    return None


def _refuse_taken_apart(words: Words, vocabulary: Vocabulary) -> None:
    """Keys that take several values and were given in one word after another: only the last would count."""
    for key, group in groupby(words.values, key=lambda word: word.key_or_group):
        same = [word for word in group if not word.is_delete()]
        given = [str(word.input_line).partition("=")[2] for word in same]
        if len(set(given)) > 1 and vocabulary.holds_several(key):
            words.refuse(in_a_row(key, given))
            words.values = [word for word in words.values if word not in same]


def word(key: str, value: str) -> str:
    """The word that sets `key` to exactly this text, whatever characters are in it."""
    return f"{key}={QuotedString(literal(value), Quote.single).with_quotes()}"
