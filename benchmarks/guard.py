"""Has something become slower? Ratios of one run beside those of an earlier one; times are never compared.

A ratio is of two things measured in the same run, and larger is better.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALLOWED = 0.10  # the share by which a ratio may fall


@dataclass(frozen=True)
class Verdict:
    """Names of ratios: `fallen` by more than allowed, `missing` now, `new` now."""

    fallen: dict[str, float]  # by what share
    missing: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.fallen and not self.missing

    def lines(self) -> list[str]:
        """One for each name, for the screen."""
        fallen = [f"FALLEN {name}: by {share:.1%} (allowed: {ALLOWED:.0%})" for name, share in self.fallen.items()]
        missing = [f"MISSING {name}: the earlier run has it" for name in self.missing]
        return fallen + missing + [f"new {name}: nothing to compare it with" for name in self.new]


def compare(now: Mapping[str, float], before: Mapping[str, float]) -> Verdict:
    """Every ratio of both runs, by name. A ratio that is no positive number has fallen altogether."""
    fallen = {}
    for name in now.keys() & before.keys():
        fall = 1.0 - now[name] / before[name]
        if not fall <= ALLOWED:  # nan, too
            fallen[name] = fall
    return Verdict(
        fallen={name: fallen[name] for name in sorted(fallen)},
        missing=tuple(sorted(before.keys() - now.keys())),
        new=tuple(sorted(now.keys() - before.keys())),
    )


def last_committed(root: Path, folder: str, kind: str) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the newest `<date>-<kind>.json` of a folder as git has it: a file that this run has written
    over is not what it is compared with. None without a repository or without such a file."""
    found = _git(root, "ls-tree", "--name-only", "HEAD", f"{folder}/")
    names = sorted(name for name in found.splitlines() if name.endswith(f"-{kind}.json"))
    if not names:
        return None
    return names[-1], json.loads(_git(root, "show", f"HEAD:{names[-1]}"))


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def table(now: Mapping[str, float], before: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each ratio of either run."""
    rows = []
    for name in sorted(now.keys() | before.keys()):
        both = name in now and name in before
        change = f"{now[name] / before[name] - 1:+.1%}" if both else ""
        rows.append({"ratio": name, "now": now.get(name, ""), "before": before.get(name, ""), "change": change})
    return rows
