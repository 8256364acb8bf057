"""A release as the start of a run: every byte is read before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable

from sftdist.core.errors import ConfigError, GateError
from sftdist.core.warm_start import started_from
from sftdist.release.registry import require_unchanged


def require_start(path: str | None, say: Callable[[str], None]) -> None:
    """Raises ConfigError where `model.path` is a release that is not what was published; any other model passes."""
    try:
        one = started_from(path)
        if one is None:
            return
        require_unchanged(one)
    except GateError as problem:
        raise ConfigError(f"model.path={path}: required a release as it was published: {problem}") from problem
    say(f"starts from the release {one}, whose files are what was published; optimizer and steps begin anew")
