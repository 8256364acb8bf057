"""Interpolations: each `${...}` is resolved or explained, and none may make a run's identity depend on the moment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hydra.core.utils import setup_globals
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftdist.core.snapshot import identifies_run, one_line

_LATER = "~"  # ends the text of every moment but the first, so that two are never the same
_NO_HYDRA = "a run has no settings of Hydra"
_DEPENDENT = (
    "which is another value at each start, so that a job that is started again or requeued would be another run; "
    "write a fixed value, or leave run.name and run.dir out: they are then made of the configuration (${now:...} may "
    "stand in run.note and tracking.*)"
)
# What OmegaConf says, and what that means.
_EXPLAINED = {
    r"Environment variable '(.+)' not found": (
        r"the environment variable \1 is not set; set it, or give a default, ${oc.env:\1,DEFAULT}"
    ),
    r"Unsupported interpolation type (\S+)": (
        r"there is no resolver \1; there are ${oc.env:NAME}, ${now:FORMAT} and ${KEY}"
    ),
    r"Interpolation key '(.+)' not found": r"there is no key \1; for the text itself write \\${\1}",
    r"Recursive interpolation": "it refers to itself; write the value",
    _NO_HYDRA: f"{_NO_HYDRA}; write the value, or ${{oc.env:NAME}}",
}


def resolved(config: DictConfig, issues: list[str]) -> dict[str, Any]:
    """The configuration as plain mappings and lists, without the interpolations that are an issue.

    `${now:...}`, and any other resolver that gives something else each time, is refused where a run's name, directory
    or hash depends on it: a job that is started again would be another run.
    """
    places, moment = list(_places(config)), datetime.now()
    with _clock(config, moment):
        values = [_value(place) for place in places]
    with _clock(config, moment, _LATER):
        later = [_value(place) for place in places]
    refused = []
    for place, value, other in zip(places, values, later, strict=True):
        if isinstance(value, _Unresolved):
            refused.append((place, f"{place.key}: given {place.text}: {value.reason}"))
        elif value != other and identifies_run(place.key):
            refused.append((place, f"{place.key}: given {place.text}, {_DEPENDENT}"))
    for place, issue in refused:
        issues.append(issue)
        place.node[place.name] = None  # others may refer to it
    with _clock(config, moment):
        container: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    for place, _ in reversed(refused):
        _remove(container, place.path)
    return container


def resolved_text(value: Any) -> str | None:
    """A single value of the command line, where it is a text that can be resolved alone."""
    config = OmegaConf.create({"value": value})
    with _clock(config, datetime.now()):
        (place,) = _places(config) or (None,)
        found = value if place is None else _value(place)
    return found if isinstance(found, str) else None


def literal(value: Any) -> Any:
    """Plain mappings, lists and scalars, written so that `resolved` gives every text back as it is here."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


@dataclass(frozen=True)
class _Place:
    """An interpolation: `node[name]`, at `path` from the root, shown as `key`, reads `text`."""

    node: Any
    path: tuple[Any, ...]
    key: str
    text: str

    @property
    def name(self) -> Any:
        return self.path[-1]


@dataclass(frozen=True)
class _Unresolved:
    reason: str


def _places(node: Any, parent: str = "", above: tuple[Any, ...] = ()) -> list[_Place]:
    """Every interpolation of a container, those that are written with a backslash too."""
    found: list[_Place] = []
    for name, text in _items(node):
        key = f"{parent}[{name}]" if isinstance(name, int) else f"{parent}.{name}" if parent else str(name)
        if OmegaConf.is_interpolation(node, name):
            found.append(_Place(node, (*above, name), key, text))
        elif isinstance(text, dict | list):
            found += _places(node[name], key, (*above, name))
    return found


def _remove(container: Any, path: tuple[Any, ...]) -> None:
    for name in path[:-1]:
        container = container[name]
    del container[path[-1]]


def _items(node: Any) -> list[tuple[Any, Any]]:
    raw = OmegaConf.to_container(node, resolve=False)
    return list(raw.items() if isinstance(raw, dict) else enumerate(raw if isinstance(raw, list) else []))


def _value(place: _Place) -> Any:
    try:
        value = place.node[place.name]
        if isinstance(value, str) and (empty := _empty(place)):
            return _Unresolved(_without_value(place, empty))
        return OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value
    except (OmegaConfBaseException, ValueError) as error:
        return _Unresolved(_reason(one_line(error)))


def _empty(place: _Place) -> str | None:
    """The first `${...}` between other text that stands for null, which OmegaConf writes as the word None."""
    parts = _parts(place.text)
    if parts == [place.text]:
        return None
    try:
        for part in parts:
            with suppress(OmegaConfBaseException):  # a brace in quotes, which `_parts` does not tell apart
                place.node[place.name] = part
                if place.node[place.name] is None:
                    return part
    finally:
        place.node[place.name] = place.text
    return None


def _parts(text: str) -> list[str]:
    """The outermost interpolations of a text."""
    found: list[str] = []
    start = depth = 0
    for match in re.finditer(r"(\\*)(\$\{)|[{}]", text):
        if match[2] and depth == 0:
            depth, start = (0 if len(match[1]) % 2 else 1), match.start(2)
        elif depth:
            depth += -1 if match[0] == "}" else 1
            found += [text[start : match.end()]] if depth == 0 else []
    return found


def _without_value(place: _Place, part: str) -> str:
    """What is said of it; a name that nobody has given is made of the whole configuration."""
    key = part[2:-1]
    if not re.fullmatch(r"\w[\w.]*", key):  # a resolver, or a key of the same section
        return f"{part} has no value; write the value itself"
    default = (place.key, key) == ("run.dir", "run.name")
    more = "leave run.dir out: it is then runs/<run.name>" if default else "write the value itself"
    return f"{key} has no value yet; give {key}=..., or {more}"


def _reason(message: str) -> str:
    for pattern, meaning in _EXPLAINED.items():
        if found := re.search(pattern, message):
            return found.expand(meaning) if found.groups() else meaning
    return message.partition(" full_key:")[0]


@contextmanager
def _clock(config: DictConfig, moment: datetime, suffix: str = "") -> Iterator[None]:
    """Resolve as if it were `moment`; the resolvers of Hydra are as before afterwards."""

    def now(pattern: str = "%Y-%m-%d_%H-%M-%S") -> str:
        return moment.strftime(pattern) + suffix

    def hydra(*path: str) -> None:
        raise ValueError(_NO_HYDRA)

    OmegaConf.clear_cache(config)
    OmegaConf.register_new_resolver("now", now, replace=True)
    OmegaConf.register_new_resolver("hydra", hydra, replace=True)
    try:
        yield
    finally:
        setup_globals()
