"""What has become of every key of a peer's file: our values with where they come from, and one note per key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.core.typed import shown


class Kind(StrEnum):
    """What became of a key, in the order in which it is told."""

    unknown = "unknown"  # no key of the peer, as far as is known here
    differs = "differs"  # means something else here
    left = "left"  # not carried over: there is nothing like it
    unneeded = "unneeded"  # not carried over, and nothing is lost by it
    carried = "carried"


@dataclass(frozen=True)
class Note:
    """One key of the peer's file (or `(word)`, where no key says it), and what became of it."""

    kind: Kind
    key: str
    text: str


class Account:
    """A peer's file while it is carried over. `folder`: where relative files are looked for; `gpus` of the peer's job.

    A rule reads with `get` and files a note for each key that it answers for. Keys without a value count as not given.
    """

    def __init__(self, given: Mapping[str, Any], *, folder: Path, gpus: int = 1) -> None:
        self.given = {key: value for key, value in given.items() if not is_empty(value)}
        self.empty = [key for key, value in given.items() if is_empty(value)]
        self.folder = folder
        self.gpus = gpus
        self.values: dict[str, Any] = {}  # our dotted key: its value
        self.origins: dict[str, str] = {}  # our dotted key: where the value comes from, as a comment
        self.notes: list[Note] = []
        self.needs: list[str] = []  # what has to be done before it runs

    def has(self, key: str) -> bool:
        """Whether the file gives a value under this key."""
        return key in self.given

    def get(self, key: str, default: Any = None) -> Any:
        """The value under a key of the peer."""
        return self.given.get(key, default)

    def first(self, keys: Iterable[str]) -> str | None:
        """The first of these keys that the file gives."""
        return next((key for key in keys if key in self.given), None)

    def put(self, ours: str, value: Any, origin: str) -> None:
        """A value of ours, and in a few words why."""
        self.values[ours] = value
        self.origins[ours] = origin

    def carry(self, key: str, ours: str, value: Any, text: str = "") -> None:
        """The key has become one of ours and means the same."""
        self.put(ours, value, key)
        self.note(Kind.carried, key, f"{ours}={shown(value)}" + (f" ({text})" if text else ""))

    def default(self, key: str, ours: str, value: Any) -> None:
        """The file does not give the key, and what the peer takes then is not what is taken here."""
        self.put(ours, value, f"the default of {key} there")

    def note(self, kind: Kind, key: str, text: str) -> None:
        """What became of a key; a key may have several notes."""
        self.notes.append(Note(kind, key, text))

    def differs(self, key: str, text: str) -> None:
        self.note(Kind.differs, key, text)

    def left(self, key: str, text: str) -> None:
        self.note(Kind.left, key, text)

    def unneeded(self, key: str, text: str) -> None:
        self.note(Kind.unneeded, key, text)

    def need(self, text: str) -> None:
        """Something that the user has to do before the file runs."""
        self.needs.append(text)

    def below(self, value: Mapping[str, Any]) -> Account:
        """An account of a mapping inside of the file; `take_in` adds what became of it."""
        return Account(value, folder=self.folder, gpus=self.gpus)

    def take_in(self, inner: Account, prefix: str) -> None:
        """The notes and needs of a mapping that stood under `prefix`."""
        self.notes += [Note(note.kind, f"{prefix}.{note.key}", note.text) for note in inner.notes]
        self.needs += inner.needs

    def answered(self) -> set[str]:
        """The keys that have a note."""
        return {note.key for note in self.notes}


def is_empty(value: object) -> bool:
    """Whether a YAML value says nothing: `key:` and `key: ""`."""
    return value is None or (isinstance(value, str) and not value.strip())


# --- values, which a peer's YAML may give as text ------------------------------------------------------------------


def number(key: str, value: object) -> float:
    """A number; `2e-5` is text in YAML, and the peers turn it into a number."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            found = float(value)
        except ValueError:
            found = math.nan  # said below
        if math.isfinite(found):
            return found
    raise wrong(key, value, "a number")


def whole(key: str, value: object) -> int:
    """A whole number."""
    found = number(key, value)
    if found != int(found):
        raise wrong(key, value, "a whole number")
    return int(found)


def count(key: str, value: object) -> int:
    """A whole number of at least 1."""
    found = whole(key, value)
    if found < 1:
        raise wrong(key, value, "a whole number of at least 1")
    return found


def flag(key: str, value: object) -> bool:
    """true or false."""
    words = {"true": True, "false": False, "auto": True}
    found = words.get(str(value).lower())
    if found is None:
        raise wrong(key, value, "true or false")
    return found


def is_on(value: object) -> bool:
    """Whether a value switches something on; `false`, `0`, `no`, `none`, an empty list or mapping do not."""
    return bool(value) and str(value).lower() not in ("false", "no", "none", "off", "0", "0.0")


def words(key: str, value: object) -> list[str]:
    """A list of words, also given as one text with commas."""
    found = value.split(",") if isinstance(value, str) else value
    if isinstance(found, list) and all(isinstance(word, str) for word in found):
        return [word.strip() for word in found if word.strip()]
    raise wrong(key, value, "a list of words")


def mapping(key: str, value: object) -> dict[str, Any]:
    """A mapping of keys."""
    if not isinstance(value, Mapping):
        raise wrong(key, value, "a mapping of keys")
    return {str(name): item for name, item in value.items()}


def wrong(key: str, value: object, required: str) -> ConfigError:
    """The error of a value that the peer would not take either."""
    return ConfigError(f"{key}: given {shown(value)}, required {required}; correct the file, then migrate it again")
