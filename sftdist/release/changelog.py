"""What changed from one release to another: data, mixture, settings, metrics and files, from the releases alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftdist.core import snapshot
from sftdist.core.errors import GateError
from sftdist.core.releases import RELEASE
from sftdist.core.storage import read_json
from sftdist.evals.report import REPORT, Estimate, EvalReport

CHANGELOG = "CHANGELOG.md"
REPORT_FOLDER = "report"
_TITLE = "# Changelog\n"
_NOT_TRAINED = ("data.store_dir", "data.workers", "data.dir")  # where things lay, not what was trained


@dataclass(frozen=True)
class Contents:
    """What a release says of itself, or a draft of one: configuration, evaluation, files (sha256 by name), the mixture
    that was trained on, by source: `asked` (lambda) and `share` of the supervised tokens, and the steps taken."""

    config: Path
    report: EvalReport
    files: Mapping[str, str]
    mixture: Mapping[str, Mapping[str, Any]]
    steps: int

    @classmethod
    def of(cls, folder: Path) -> Contents:
        """Of a published release. Raises GateError where a part of it cannot be read."""
        try:
            facts = read_json(folder / RELEASE)
            files = {name: entry["sha256"] for name, entry in facts["files"].items()}
            mixture = {source["name"]: source for source in facts["mixture"]}
            steps = int(facts["run"]["steps"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise GateError(
                f"{folder / RELEASE}: cannot be read ({problem}); sftdist release verify says what is wrong"
            ) from problem
        return cls(folder, EvalReport.read(folder / REPORT_FOLDER / REPORT), files, mixture, steps)


@dataclass(frozen=True)
class Changes:
    """Lines for people. `data` are those of `data.comparison`, which needs the stores of both."""

    data: Sequence[str]
    mixture: Sequence[str]
    settings: Sequence[str]
    metrics: Sequence[str]
    files: Sequence[str]

    def sections(self) -> dict[str, Sequence[str]]:
        """By title; a section in which nothing changed says so."""
        found = {
            "Data": self.data,
            "Mixture": self.mixture,
            "Settings": self.settings,
            "Metrics (holdout, 95 % intervals)": self.metrics,
            "Files": self.files,
        }
        return {title: list(lines) or ["no change"] for title, lines in found.items()}


def changes(old: Contents, new: Contents, data: Sequence[str]) -> Changes:
    """From one release to another. Raises ConfigError where a configuration cannot be read."""
    return Changes(
        data=data,
        mixture=list(_mixture(old.mixture, new.mixture)),
        settings=[*_steps(old.steps, new.steps), *_settings(old.config, new.config)],
        metrics=list(_metrics(old.report, new.report)),
        files=list(_files(old.files, new.files)),
    )


def entry(version: int, created: str, last: int | None, found: Changes | None) -> str:
    """A version's section of CHANGELOG.md."""
    lines = [f"## v{version} ({created[:10]})", ""]
    if found is None:
        return "\n".join([*lines, "The first release.", ""])
    lines += [f"Compared with v{last}, which was in use until then.", ""]
    for title, changed in found.sections().items():
        if title != "Files":  # what changed in them stands above
            lines += [f"### {title}", "", *(f"- {line}" for line in changed), ""]
    return "\n".join(lines)


def extended(before: str | None, new: str) -> str:
    """CHANGELOG.md with a new section on top of those that the version before had."""
    older = (before or "").removeprefix(_TITLE).strip("\n")
    return "\n".join([_TITLE, new.strip("\n"), *(["", older] if older else []), ""])


def _mixture(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        then, now = _part(old.get(name)), _part(new.get(name))
        if then != now:
            yield f"{name}: {then} -> {now}"


def _part(source: Mapping[str, Any] | None) -> str:
    if source is None:
        return "not there"
    asked = "no lambda" if source.get("asked") is None else f"lambda {source['asked']:g}"
    share = source.get("share")
    return asked if share is None else f"{asked}, {share:.1%} of the supervised tokens"


def _steps(old: int, new: int) -> list[str]:
    return [] if old == new else [f"steps taken: {old:,} -> {new:,}"]


def _settings(old: Path, new: Path) -> Iterator[str]:
    then, now = snapshot.read_config(old), snapshot.read_config(new)
    for key, (before, after) in snapshot.differences(then, now).items():
        if key not in _NOT_TRAINED and not (key.startswith("data.") and key.endswith((".lam", ".path", ".mix"))):
            yield f"{key}: {before} -> {after}"


def _metrics(old: EvalReport, new: EvalReport) -> Iterator[str]:
    """The figures of both tuned models, each with its interval: a metric that only one of them has says so."""
    for name in sorted({*old.metrics, *new.metrics}):
        then, now = (_figure(report, name) for report in (old, new))
        if then != now:
            yield f"{name}: {then} -> {now}"


def _figure(report: EvalReport, name: str) -> str:
    scores = report.metrics.get(name)
    if scores is None or scores.fault() is not None:
        return "not measured"
    return shown(scores.figures().tuned)


def shown(found: Estimate) -> str:
    """`0.912 [0.881, 0.940]`."""
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _files(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if name not in new:
            yield f"{name}: removed"
        elif name not in old:
            yield f"{name}: added"
        elif old[name] != new[name]:
            yield f"{name}: changed"
