"""The words of a command line: which group or key each one sets, and what is wrong with those that cannot be read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException


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


def read_words(overrides: Sequence[str], groups: Collection[str]) -> Words:
    """Hydra's grammar for each word, with `groups` of YAML files that a word can choose from."""
    words, parser = Words(), OverridesParser.create()
    for text in overrides:
        try:
            word = parser.parse_override(text)
        except HydraException:
            words.issues.append(unreadable(text))
            if (key := text.lstrip("+").partition("=")[0]) in groups:
                words.refused.append(key)
            continue
        key = word.key_or_group
        if word.is_sweep_override():
            words.issues.append(f"{key}: given several values, required one; for a list write '{key}=[a,b]'")
        elif key in groups and isinstance(word.value(), str | int) and not word.is_delete():
            words.groups[key] = str(word.value())
        elif key == "mix":
            words.issues.append("mix: unknown key; did you mean data.mix?")
        else:
            words.values.append(word)
    return words


def unreadable(text: str) -> str:
    """The issue of a word that does not parse, with the spelling that would."""
    key, equals, value = text.partition("=")
    if text.startswith("-"):
        return f"{text}: unknown option; see --help"
    if not equals or not key:
        return f"{text}: given a word without '=', required key=value"
    escaped = value.replace('"', '\\"')
    return f"{key}: the value has characters that need quotes; write '{key}=\"{escaped}\"'"


def word(key: str, value: str) -> str:
    """The word that sets `key` to exactly this text, whatever characters are in it."""
    literal = value.replace("${", "\\${")  # else the start of an interpolation, in quotes too
    return f"{key}={QuotedString(literal, Quote.single).with_quotes()}"
