"""What is said of a command-line word that cannot be read: the very word that was meant, where it can be told."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from sftdist.core.resolve import literal
from sftdist.core.typed import ANY_NAME, PEERS_NAMES, nearest

_KEY = re.compile(r"[+~]{0,2}\w[\w./@-]*")
DASHES = "-\N{EN DASH}\N{EM DASH}"
_SEVERAL = ("anything", "a list", "a section")
_OF_WORDS = ("text", *_SEVERAL)  # what a value with a space in it can be
_OPENING = ("{", "[", "(")
_QUOTED_KEY = r"""([{,]\s*)(["'])([^"':,{}]+)\2\s*:"""


@dataclass(frozen=True)
class Vocabulary:
    """What words can say: the groups of YAML files, the names in one of them (looked up only for a word that is wrong),
    and every key with its type in the user's words."""

    groups: Collection[str]
    names_in: Callable[[str], Sequence[str]]
    keys: Mapping[str, str]

    def names(self, group: str) -> Sequence[str]:
        """The files of a group; none where there is no such group."""
        return self.names_in(group) if group in self.groups else ()

    def kind(self, key: str) -> str:
        """A key's type in the user's words; nothing where there is no such key."""
        for known, kind in self.keys.items():
            if re.fullmatch(re.escape(known).replace(re.escape(ANY_NAME), r"[^.]+"), key):
                return kind
        return ""

    def holds_several(self, key: str) -> bool:
        """Whether a key's value may be a list or a mapping."""
        return self.kind(key).startswith(_SEVERAL)

    def meant(self, name: str) -> str | None:
        """The key that a word without its section, or with another trainer's name, most likely means."""
        name = name.replace("-", "_")
        same = [key for key in self.keys if key == name or (key.endswith(f".{name}") and ANY_NAME not in key)]
        return same[0] if len(same) == 1 else nearest(name, list(self.keys))


def unreadable(text: str, vocabulary: Vocabulary | None = None) -> str:
    """The issue of a word that does not parse, with the spelling that would."""
    key, equals, value = text.partition("=")
    if text[:1] in DASHES:
        return f"{text}: unknown option; see --help"
    if not equals or not key:
        return f"{text}: given a word without '=', required key=value"
    if key != key.strip():
        return f"{text}: given spaces around '=', required {key.strip()}={value.strip()}"
    if not _KEY.fullmatch(key):
        near = re.sub(r"[^\w.]+", ".", key).strip(".")
        known = vocabulary is not None and (near in vocabulary.groups or vocabulary.kind(near))
        meant = f"did you mean {near}?" if known else "required letters, digits, '_' and '.'"
        return f"{text}: given a key with characters that no key has; {meant}"
    if value.startswith("{") and not (vocabulary and vocabulary.kind(key.lstrip("+")).startswith("text")):
        return _mapping(key, value)
    bare = value.strip("(),")
    if value.endswith(",") and (found := _readable([f"{key}={bare}"])):
        return f"{key}: given a comma at the end; write {found}"
    if value.startswith("(") and (found := _readable([f"{key}=[{bare}]"])):
        return f"{key}: given a list in round brackets; write {found}"
    if vocabulary and vocabulary.holds_several(key.lstrip("+")) and (found := _readable([_quoted_items(key, value)])):
        return f"{key}: the list has texts that need quotes; write {found}"
    return f"{key}: the value has characters that need quotes; write {quoted(key, value)}"


def _quoted_items(key: str, value: str) -> str:
    """The word in which every item of a list stands in quotes."""
    items = [item.strip().strip("\"'") for item in value.strip("[]").split(",")]
    return f"{key}=[{','.join(QuotedString(item, Quote.double).with_quotes() for item in items)}]"


def _mapping(key: str, value: str) -> str:
    """The issue of a mapping that does not parse, most often JSON."""
    bare = re.sub(_QUOTED_KEY, r"\1\3:", value)
    what = "keys stand without quotes" if bare != value else "a mapping reads {key:value,key:value}"
    found = _readable([f"{key}={bare}"], several=True)
    return f"{key}: given {value}, which cannot be read; {what}{f': write {found}' if found else ''}"


def quoted(key: str, value: str) -> str:
    """The word for a shell in which a value is one text, whatever characters it has."""
    text = value if value.count("{") == value.count("}") else literal(value)  # no interpolation then
    return for_a_shell(f"{key}={QuotedString(text, Quote.double).with_quotes()}")


def for_a_shell(word: str) -> str:
    """A word as one would type it."""
    if "'" not in word:
        return shlex.quote(word)
    return '"' + re.sub(r'(["\\$`])', r"\\\1", word) + '"'


def several(key: str, value: str, vocabulary: Vocabulary) -> str:
    """The issue of `key=a,b` outside a sweep."""
    given = f"{key}: given several values, {value}, required one"
    jobs = "to run one job for each, add -m"
    if key in vocabulary.groups:
        return f"{given}; {jobs}"
    if vocabulary.holds_several(key):
        pairs = all(":" in part for part in value.split(","))
        return f"{given}; write {for_a_shell(f'{key}={{{value}}}' if pairs else f'{key}=[{value}]')}; {jobs}"
    if vocabulary.kind(key).startswith("text"):
        return f"{given}; for one text write {quoted(key, value)}; {jobs}"
    return f"{given}; {jobs}"


def option(words: Sequence[str], vocabulary: Vocabulary) -> str:
    """The issue of a word that begins with a dash, and of the words without '=' that follow it."""
    text = " ".join(words)
    name, _, value = words[0].lstrip(DASHES).partition("=")
    value = value or (words[1] if len(words) > 1 else "...")
    if name.partition("-")[0] in ("config", "preset", "exp"):
        stem = Path(value).stem if "." in value and value != "..." else "NAME" if value == "..." else value
        return f"{text}: unknown option; a configuration is a preset: save it as conf/exp/{stem}.yaml, give +exp={stem}"
    if meant := vocabulary.meant(name):
        value = "true" if value == "..." and vocabulary.kind(meant) == "true or false" else value
        return f"{text}: unknown option; keys have no dashes: {meant}={value}"
    return f"{text}: unknown option; see --help"


def bare_words(before: str | None, words: Sequence[str], vocabulary: Vocabulary) -> str:
    """The issue of words without '='; `before` is the word in front of them, where it has one."""
    text, first = " ".join(words), words[0].rstrip(":").lstrip("+")
    given = f"{text}: given {'words' if len(words) > 1 else 'a word'} without '=', required key=value"
    values = [word.strip("=") for word in words[1:] if word.strip("=")]
    group, _, name = first.rpartition("/")
    if first in vocabulary.names("exp"):
        return f"{given}; did you mean +exp={first}?"
    if name in vocabulary.names(Path(group).name):
        return f"{given}; did you mean {Path(group).name}={name}?"
    if first in vocabulary.groups:
        return f"{given}; did you mean {first}={values[0] if values else 'NAME'}?"
    if vocabulary.kind(first) or first in PEERS_NAMES:
        default = "true" if vocabulary.kind(first) == "true or false" else "..."
        return f"{given}; did you mean {PEERS_NAMES.get(first, first)}={values[0] if values else default}?"
    if before is not None and words[0].startswith("="):
        return f"{before} {text}: given spaces around '='; write {before}={text.strip('= ')}"
    key = (before or "").partition("=")[0].lstrip("+")
    has_words = key not in vocabulary.groups and vocabulary.kind(key).startswith(_OF_WORDS)
    return _split(before, words, vocabulary) if before and has_words else given


def _split(before: str, words: Sequence[str], vocabulary: Vocabulary) -> str:
    """The issue of a value that the shell has taken apart at its spaces."""
    key, _, value = before.partition("=")
    whole = " ".join([before, *words])
    given = f"{whole}: given a value that the shell has taken apart at its spaces"
    if value.startswith(_OPENING):
        found = _readable([re.sub(r"[\s,]+", ",", re.sub(r":\s+", ":", whole)), whole])
        return f"{given}; write {found}" if found else f"{given}; put the whole word in single quotes"
    parts = ",".join([value, *words])
    listed = (
        f"; for a list write {for_a_shell(f'{key}=[{parts}]')}" if vocabulary.holds_several(key.lstrip("+")) else ""
    )
    return f"{given}; write {_readable([whole]) or quoted(key, ' '.join([value, *words]))}{listed}"


def in_a_row(key: str, values: Sequence[str]) -> str:
    """The issue of one key given again and again, which is what a shell makes of braces without quotes."""
    pairs = all(":" in value for value in values)
    joined = ",".join(values)
    meant = for_a_shell(f"{key}={{{joined}}}" if pairs else f"{key}=[{joined}]")
    return (
        f"{key}: given {len(values)} times in a row, {', '.join(values)}, required one value; a shell takes braces "
        f"apart that stand without quotes: write {meant}"
    )


def _readable(words: Iterable[str], *, several: bool = False) -> str | None:
    """The first of these words that Hydra can read as one value, or as several, quoted for a shell."""
    parser = OverridesParser.create()
    for word in words:
        try:
            if not parser.parse_override(word).is_sweep_override() or several:
                return for_a_shell(word)
        except HydraException:
            continue
    return None
