"""Starting from a release: `model.path=release:NAME@v3` becomes its folder, and what a run began from is written down.

That is a new run with a new optimizer, on weights that were trained before. To go on with a run that was stopped is
something else: the same command again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.core.releases import PREFIX, RELEASE, Release, find
from sftdist.core.settings import TrainConfig
from sftdist.core.storage import MANIFEST, read_json, sha256_file

MODEL = "config.json"  # an adapter alone has none


def name_folder(cfg: TrainConfig) -> list[str]:
    """Replace `release:NAME@v3` and `release:NAME` (the one in use) in `model.path` by the folder of that version, so
    that the run keeps its start when another version comes into use; the issue where there is no such model."""
    given = cfg.model.path
    if given is None or not given.startswith(PREFIX):
        return []
    try:
        found = find(Path(cfg.registry).expanduser(), given.removeprefix(PREFIX))
    except ConfigError as problem:
        return [f"model.path: {issue}" for issue in problem.issues]
    cfg.model.path = str(found.path)
    return [f"model.path: given {given}, but {fault}" for fault in _faults(found)]


def _faults(one: Release) -> list[str]:
    """What can be seen without reading the weights; `sftdist train` reads them, too."""
    if not (one.path / RELEASE).is_file():
        return [f"{one.path} has no {RELEASE}, so it is not whole; see sftdist release verify {one}, or give another"]
    if not (one.path / MODEL).is_file():
        return [
            f"{one} has no {MODEL}: it is an adapter alone, which nothing can be trained on; required is a whole "
            "model: publish an export that is merged (export.merge=true), and start from that"
        ]
    return []


def started_from(path: str | None) -> Release | None:
    """The release whose folder `model.path` is; None where it is no release."""
    if path is None or not (Path(path) / RELEASE).is_file():
        return None
    return find(Path(), str(Path(path)))


def parent_of(path: str | None) -> dict[str, Any] | None:
    """What the model in `model.path` was before: a release (its name and version, sha256 of the model and of
    `release.json`), or the export of a run at a step; None for any other model."""
    if path is None:
        return None
    folder = Path(path)
    if (one := started_from(path)) is not None:
        facts = one.facts()
        return {
            "release": str(one),
            "path": path,
            "model_sha256": facts.get("model_sha256"),
            "release_sha256": sha256_file(folder / RELEASE),
        }
    if (folder / MANIFEST).is_file() and (folder.parent / "config.yaml").is_file():
        return {"run": folder.resolve().parent.name, "path": path, "step": read_json(folder / MANIFEST).get("step")}
    return None
