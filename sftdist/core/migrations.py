"""What became of the keys of earlier configurations, and which versions of a configuration can be read."""

from __future__ import annotations

import re

from sftdist.core.settings import CONFIG_VERSION

# The version that gave a key up: {the key: the one to use instead, or a sentence that says what to do}. `<name>` stands
# for any name. A key that was given up never comes back with another meaning, so a key alone tells what is meant.
CHANGES: dict[int, dict[str, str]] = {}
_ANY_NAME = "<name>"
_KEY = re.compile(r"[\w.<>]+")


def advice(key: str) -> str | None:
    """What to do about a key that this version does not have, or None where no earlier one had it either."""
    last, version = key, None
    for number in sorted(CHANGES):  # a key may have been renamed twice
        change = _change(last, number)
        if change is None:
            continue
        if not _KEY.fullmatch(change):
            return f"{key}: removed in config_version {number}: {change}"
        last, version = change, number
    return None if version is None else f"{key}: renamed to {last} in config_version {version}: write {last}=..."


def version_issue(version: object) -> str | None:
    """Why a configuration of this version cannot be read, or None. What an earlier one has is read key by key."""
    if not isinstance(version, int) or isinstance(version, bool):
        return f"config_version: given {version!r}, required a whole number up to {CONFIG_VERSION}"
    if version > CONFIG_VERSION:
        return (
            f"config_version: given {version}, this sftdist reads {CONFIG_VERSION} and earlier; "
            "use the sftdist that wrote it, or a newer one (pip install --upgrade sftdist)"
        )
    return None if version >= 1 else f"config_version: given {version}, required 1 to {CONFIG_VERSION}"


def _change(key: str, number: int) -> str | None:
    """What version `number` did to a key, by itself or with the section that it was in."""
    for old, new in CHANGES[number].items():
        pattern = re.escape(old).replace(re.escape(_ANY_NAME), r"([^.]+)")
        found = re.fullmatch(rf"{pattern}((?:\..+)?)", key)
        if found is None:
            continue
        *names, below = found.groups()
        for name in names:
            new = new.replace(_ANY_NAME, name, 1)
        return new + below if _KEY.fullmatch(new) else new
    return None
