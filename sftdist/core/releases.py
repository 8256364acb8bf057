"""Releases as they are named: `NAME@vN`, `NAME` (the one in use) or a folder; `release.registry` makes them.

`registry/<name>/v<N>/` is a version, `registry/<name>/latest` a file with the name of the version in use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sftdist.core.errors import ConfigError, GateError
from sftdist.core.storage import read_json

RELEASE = "release.json"
LATEST = "latest"
PREFIX = "release:"  # before the name of a release, where a folder or a name on the Hub may stand, too
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_VERSION = re.compile(r"v([1-9][0-9]*)")


@dataclass(frozen=True)
class Release:
    """A published version. Its folder is a model folder, with `release.json` and everything else beside the weights."""

    name: str
    version: int
    path: Path

    def __str__(self) -> str:
        return f"{self.name}@v{self.version}"

    def facts(self) -> dict[str, Any]:
        """What `release.json` says. Raises GateError where that cannot be read."""
        try:
            found = read_json(self.path / RELEASE)
        except (OSError, ValueError) as problem:
            raise GateError(f"{self.path / RELEASE}: cannot be read ({problem}), but every release has one") from None
        return dict(found)


def versions(registry: Path, name: str) -> list[Release]:
    """The published versions of a name, the oldest first; none where there is no such name."""
    home = registry / name
    found = [(_VERSION.fullmatch(path.name), path) for path in home.iterdir()] if home.is_dir() else []
    made = [Release(name, int(match[1]), path) for match, path in found if match and path.is_dir()]
    return sorted(made, key=lambda one: one.version)


def names(registry: Path) -> list[str]:
    """Every name with a published version, in order."""
    found = (path.name for path in registry.iterdir()) if registry.is_dir() else iter(())
    return sorted(name for name in found if _NAME.fullmatch(name) and versions(registry, name))


def latest(registry: Path, name: str) -> Release | None:
    """The version in use; None before the first release has come to its end."""
    pointer = registry / name / LATEST
    if not pointer.is_file():
        return None
    word = pointer.read_text(encoding="utf-8").strip()
    match = _VERSION.fullmatch(word)
    path = registry / name / word
    if match is None or not path.is_dir():
        raise ConfigError(
            f"{pointer}: given {word!r}, required one of the versions beside it; set it with sftdist release rollback"
        )
    return Release(name, int(match[1]), path)


def find(registry: Path, reference: str) -> Release:
    """The release that `NAME@vN`, `NAME` (the latest) or the folder of a release means. Raises ConfigError."""
    folder = Path(reference).expanduser()
    if (folder / RELEASE).is_file():
        facts = Release(folder.name, 0, folder).facts()
        return Release(str(facts["name"]), int(facts["version"]), folder)
    name, at, word = reference.partition("@")
    made = versions(registry, name) if _NAME.fullmatch(name) else []
    if not made:
        raise ConfigError(_no_name(registry, reference, name))
    if not at or word == LATEST:
        return latest(registry, name) or made[-1]
    match = _VERSION.fullmatch(word)
    for one in made:
        if match and one.version == int(match[1]):
            return one
    have = ", ".join(f"v{one.version}" for one in made)
    raise ConfigError(f"{reference}: given the version {word!r}, but {registry / name} has {have}")


def resolve(registry: Path, reference: str) -> Path:
    """The model folder that `NAME@vN`, `NAME` (the latest) or the folder of a release means. Raises ConfigError."""
    return find(registry, reference).path


def check_name(name: str) -> str:
    """The name, where a release can have it. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name: given {name!r}, required letters, digits, '_', '-' and '.', such as support-bot")
    return name


def _no_name(registry: Path, reference: str, name: str) -> str:
    have = names(registry)
    close = get_close_matches(name, have, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    where = f"{registry} has {', '.join(have) or 'no release'}"
    return f"{reference}: given no release, required NAME@vN, NAME or the folder of one; {where}{meant}"
