"""Every run in one index: a line of JSON each, with what it takes to tell two runs apart."""

from __future__ import annotations

import calendar
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from sftdist.core.storage import append_jsonl, read_jsonl

FILE = "ledger.jsonl"  # beside the run directories
_TIME = "%Y-%m-%dT%H:%M:%SZ"
PACKAGES = ("sftdist", "torch", "deepspeed", "transformers", "tokenizers", "peft", "datasets", "numpy", "safetensors")


def record(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one run to the ledger at `path`, with the time (UTC, ISO 8601)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_jsonl(path, [{"time": time.strftime(_TIME, time.gmtime()), **entry}])


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in the ledger, oldest first; none where the file is absent."""
    return list(read_jsonl(path)) if path.is_file() else []


def seconds_of(entry: Mapping[str, Any]) -> float:
    """When a line was written, in seconds since 1970."""
    return float(calendar.timegm(time.strptime(entry["time"], _TIME)))


def versions() -> dict[str, str]:
    """The versions of Python and of every installed package that can change a run's numbers."""
    found = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    return {"python": platform.python_version(), **found}


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """`{"commit", "dirty"}` of the repository at `folder` (default: sftdist's own checkout); None outside of one."""
    folder = folder or Path(__file__).resolve().parents[2]
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit or None, "dirty": None if commit is None or status is None else bool(status)}


def _installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
