"""The registry: `registry/<name>/v<N>/`, each version whole from the moment that it has its name, and never changed.

A version is written beside the others under a temporary name and renamed when all of it is on the disk, so a process
that is killed leaves a whole version or none. `latest` is a file that holds the name of a version (a link is not known
to every network file system) and moves last. Publishers take turns at a lock; where the file system has no locks, the
rename decides who gets a number.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftdist.core.errors import ConfigError, GateError
from sftdist.core.lock import alone
from sftdist.core.releases import LATEST, RELEASE, Release, check_name, find, latest, versions
from sftdist.core.storage import (
    append_jsonl,
    commit_directory,
    read_jsonl,
    read_manifest,
    sha256_file,
    temporary_directory,
    verify_directory,
    verify_files,
    write_manifest,
    write_text,
)

LOG = "log.jsonl"  # every release and every rollback of a name
HOLDOUT_ROWS = ("report/rows.jsonl", "report/report.html")  # what holds the holdout's prompts and the answers
_SHOWN = 20
Entries = Mapping[str, Mapping[str, Any]]  # bytes and sha256 of files, by name


@dataclass(frozen=True)
class Draft:
    """A version under way: where its files are written, the number that it will have, and what `latest` is now."""

    name: str
    version: int
    folder: Path
    last: Release | None


def release(
    registry: Path,
    name: str,
    fill: Callable[[Path], Entries],
    describe: Callable[[Draft], Mapping[str, Any]],
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Release:
    """Publish the next version of `name`, then move `latest` to it.

    `fill` writes what does not depend on the number (the weights: other publishers need not wait for that) and returns
    the entries of files that need no second reading; `describe` writes the rest, and returns what stands in
    `release.json` beside the entry of every file; it is called again where somebody else has got the number. What
    either raises ends the matter: nothing is left then.
    """
    home = registry / check_name(name)
    temp = temporary_directory(home / "release")
    try:
        known = fill(temp)
        with alone(home / ".lock", lambda holder: say(f"waiting for {holder}, which is releasing {name}, too")):
            made = _commit(registry, name, temp, known, describe)
            _point(home, versions(registry, name)[-1].version)  # where nobody waits, a later one may be there by now
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return made


def finished(registry: Path, name: str, model_sha256: str) -> Release | None:
    """The newest version, where it is of this model already; None where there is something to release. Raises GateError
    where its files have changed.

    `latest` moves to it where its publisher was killed before that, and stays where a rollback has put it.
    """
    made = versions(registry, name)
    if not made or made[-1].facts().get("model_sha256") != model_sha256:
        return None
    newest = made[-1]
    require_unchanged(newest)
    with alone(registry / name / ".lock", lambda holder: None):
        lines = history(registry, name)
        begun = max((at for at, line in enumerate(lines) if _wrote(line, newest.version)), default=0)
        if not any(line["event"] == "rollback" for line in lines[begun:]):
            _point(registry / name, newest.version)
    return newest


def _commit(
    registry: Path, name: str, temp: Path, known: Entries, describe: Callable[[Draft], Mapping[str, Any]]
) -> Release:
    home = registry / name
    while True:
        version = max((found.version for found in versions(registry, name)), default=0) + 1
        facts = describe(Draft(name, version, temp, latest(registry, name)))
        own = {"name": name, "version": version, "created": now()}
        write_manifest(temp, known, name=RELEASE, facts={**own, **facts})
        for file in temp.rglob("*"):
            if file.is_file():
                file.chmod(file.stat().st_mode & ~0o222)  # nobody edits a release by accident
        # Before the rename, so that every whole version has its line; one that is killed here leaves a line too many.
        _log(home, "release", version, sha256=sha256_file(temp / RELEASE))
        if commit_directory(temp, home / f"v{version}"):
            return Release(name, version, home / f"v{version}")


def rollback(registry: Path, reference: str) -> tuple[str | None, Release]:
    """Move `latest` to the release `NAME@vN`, and note it in the log; what `latest` said, and the release it is now.

    Raises GateError where files of it have changed.
    """
    target = find(registry, reference)
    home = registry / target.name
    if target.path.resolve() != (home / f"v{target.version}").resolve():
        raise ConfigError(f"{reference}: it is not in {registry}; give the registry that it is in: --registry FOLDER")
    require_unchanged(target)
    pointer = home / LATEST
    with alone(home / ".lock", lambda holder: None):
        before = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
        _log(home, "rollback", target.version, was=before)
        _point(home, target.version)
    return before, target


def history(registry: Path, name: str) -> list[dict[str, Any]]:
    """Every release and rollback of a name, the oldest first."""
    path = registry / name / LOG
    return list(read_jsonl(path)) if path.is_file() else []


def problems_of(one: Release, below: Sequence[str] = ()) -> list[str]:
    """What is wrong with the files of a release, each by its name: changed, missing, or not listed in `release.json`.

    `release.json` itself is held against the registry's log, where it lies in a registry. `below`: only files whose
    names begin so, without reading the weights.
    """
    if below:
        problems = _problems_below(one.path, tuple(below))
    else:
        problems = verify_directory(one.path, name=RELEASE)
        if not in_registry(one):  # from the Hub, where prompts and answers may have been kept back
            problems = [problem for problem in problems if problem not in _kept_back(one.path)]
    if problems or not in_registry(one):
        return problems
    logged = {line["sha256"] for line in history(one.path.parent.parent, one.name) if _wrote(line, one.version)}
    if not logged:
        return [f"{one.path.parent / LOG}: says nothing of v{one.version}, so that nobody can tell what was published"]
    if sha256_file(one.path / RELEASE) not in logged:
        return [f"{one.path / RELEASE}: its sha256 is not the one in the registry's {LOG}; one of them has changed"]
    return []


def require_unchanged(one: Release, below: Sequence[str] = ()) -> None:
    """Raises GateError with what is not as it was published; see `problems_of`."""
    if problems := problems_of(one, below):
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        advice = "restore these files, or move the release away and publish its model again"
        raise GateError("\n".join([f"{one} is not what was published:", *problems[:_SHOWN], *more, advice]))


def in_registry(one: Release) -> bool:
    """Whether it lies where it was published, and not in a folder that somebody took elsewhere."""
    return (one.path.parent / LOG).is_file() or (one.path.parent / LATEST).is_file()


def _problems_below(folder: Path, below: tuple[str, ...]) -> list[str]:
    try:
        entries = read_manifest(folder, name=RELEASE)
    except (OSError, ValueError) as error:
        return [f"{folder / RELEASE}: unreadable ({error})"]
    wanted = {name: entry for name, entry in entries.items() if name.startswith(below)}
    return verify_files(folder, wanted, manifest=RELEASE)


def _kept_back(folder: Path) -> set[str]:
    """What `verify_directory` says of rows that are not there."""
    gone = {name: {"bytes": 0, "sha256": ""} for name in HOLDOUT_ROWS if not (folder / name).is_file()}
    return set(verify_files(folder, gone, manifest=RELEASE))


def _point(home: Path, version: int) -> None:
    write_text(home / LATEST, f"v{version}\n")


def _wrote(line: Mapping[str, Any], version: int) -> bool:
    return bool(line["event"] == "release" and line["version"] == version)


def _log(home: Path, event: str, version: int, **more: Any) -> None:
    append_jsonl(home / LOG, [{"time": now(), "event": event, "version": version, **more}])


def now() -> str:
    """UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
