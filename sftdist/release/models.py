"""The folder of a model that a user names: a folder, a release, or a repository of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from sftdist.core.errors import ConfigError
from sftdist.core.releases import PREFIX, names, resolve
from sftdist.release.hub import downloaded, is_repository


def model_folder(registry: Path, reference: str, revision: str | None = None) -> Path:
    """`reference` is a folder, `NAME@vN` or `NAME` of the registry (also behind `release:`), or `OWNER/NAME` of the Hub
    at `revision`.

    Raises ConfigError for what is none of them, or cannot be had.
    """
    if reference.startswith(PREFIX):
        return resolve(registry, reference.removeprefix(PREFIX))
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder
    if "@" in reference or reference in names(registry):
        return resolve(registry, reference)
    if is_repository(reference):
        return downloaded(reference, revision)
    raise ConfigError(
        f"given {reference}, required the folder of a model, NAME@vN of {registry}, or OWNER/NAME of the Hub"
    )
