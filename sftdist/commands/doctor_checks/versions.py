"""Python and the packages that training needs, against the bounds of this version of sftdist."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sftdist.commands.doctor_checks.finding import Finding, ok, problem
from sftdist.core.ledger import versions

_CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Versions:
    """`required`: package -> its bounds ("" for any version); `installed`: package -> its version, where it is there;
    `shown`: the packages that can change a run's numbers."""

    python: str
    requires_python: str
    required: dict[str, str]
    installed: dict[str, str]
    shown: tuple[str, ...]


def look() -> Versions:
    requires_python, lines = _declared()
    requirements = [Requirement(line) for line in lines]
    needed = {item.name: str(item.specifier) for item in requirements if not item.marker or item.marker.evaluate()}
    found = {name: metadata.version(name) for name in needed if any(metadata.distributions(name=name))}
    shown = tuple(name for name in versions() if name in needed)
    return Versions(platform.python_version(), requires_python, needed, found, shown)


def _declared() -> tuple[str, list[str]]:
    """What this version declares: a checkout's pyproject.toml, which an editable install does not follow, or the
    metadata of the installed package."""
    file = _CHECKOUT / "pyproject.toml"
    if file.is_file():
        project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        if project["name"] == "sftdist":
            return project["requires-python"], project["dependencies"]
    return metadata.metadata("sftdist")["Requires-Python"], metadata.requires("sftdist") or []


def findings(found: Versions) -> Iterator[Finding]:
    fits = Version(found.python) in SpecifierSet(found.requires_python)
    python = f"{found.python} (required: {found.requires_python})"
    yield ok("python", python) if fits else problem("python", python, "Make a new environment with another Python.")
    wrong = {name: issue for name, bounds in found.required.items() if (issue := _issue(name, bounds, found))}
    if wrong:
        lines = " ".join(f"'{name}{found.required[name]}'" for name in wrong)
        yield problem("packages", "; ".join(wrong.values()), f"    pip install {lines}")
        return
    shown = ", ".join(f"{name} {found.installed[name]}" for name in found.shown)
    yield ok("packages", f"all {len(found.required)} required packages are within their bounds: {shown}")


def _issue(name: str, bounds: str, found: Versions) -> str:
    if name not in found.installed:
        return f"{name} is not installed (required: {bounds or 'any version'})"
    version, allowed = Version(found.installed[name]), SpecifierSet(bounds)
    if allowed.contains(version, prereleases=True):
        return ""
    below = any(Version(item.version) > version for item in allowed if item.operator in (">=", ">", "~="))
    return f"{name} {version} is too {'old' if below else 'new'} (required: {bounds})"
