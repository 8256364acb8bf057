"""Lay out the quickstart's folder: three sources, the ticket's JSON schema and the tiny base model."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

from sftdist.assets import desk
from sftdist.core.settings import TrainConfig

SCHEMA_FILE = "data/ticket.schema.json"
EXP = "quickstart"  # the preset in conf/exp that uses these files
DATA_DIR = "quickstart/data"  # its data.dir


def _data_files() -> dict[str, bytes]:
    files = {SCHEMA_FILE: json.dumps(desk.SCHEMA, indent=2) + "\n"}
    for source in desk.ROWS:
        files[f"data/{source}.jsonl"] = "".join(json.dumps(row) + "\n" for row in desk.rows(source))
    return {path: text.encode() for path, text in files.items()}


def _base_files() -> dict[str, bytes]:
    base = resources.files("sftdist.assets") / "base"
    return {f"base/{item.name}": item.read_bytes() for item in base.iterdir() if item.is_file()}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def ensure(folder: Path) -> list[str]:
    """Make `folder/data/*.jsonl`, the schema and `folder/base` what this version ships; returns the paths written.

    Each file appears whole or not at all, and one that is right already is left alone, so any number of processes
    may call this at once. An edited file is put back: copy the folder to change it. Raises OSError where
    `folder` cannot be written.
    """
    written = []
    for name, content in {**_data_files(), **_base_files()}.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            _write(path, content)
            written.append(name)
    return written


def lay_out(cfg: TrainConfig) -> None:
    """For the preset `quickstart` as it is shipped: see that its data and base model are there, beside each other.

    With a `data.dir` of the user's own nothing is written: that folder is theirs.
    """
    if cfg.exp == EXP and cfg.data.dir == DATA_DIR:
        ensure(Path(DATA_DIR).parent)
