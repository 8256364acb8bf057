"""One safetensors file on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sftdist.core.storage import fsync, sha256_file


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a file and flush it to the disk; returns its entry in a manifest. Raises OSError or SafetensorError."""
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    # safetensors 0.8 makes files that only their owner can read; the directory's mode has the user's umask in it.
    path.chmod(path.parent.stat().st_mode & 0o666)
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
