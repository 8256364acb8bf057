"""What `sftdist release list` shows of each release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftdist.core.releases import latest, versions


def listing(registry: Path, name: str) -> list[dict[str, Any]]:
    """The releases of a name as plain values, the oldest first."""
    in_use = latest(registry, name)
    found = []
    for one in versions(registry, name):
        facts = one.facts()
        found.append(
            {
                "release": str(one),
                "in_use": one == in_use,
                "created": facts["created"],
                "run": facts["run"]["name"],
                "model_sha256": facts["model_sha256"],
                "rules": facts["gate"]["passed"],
                "bytes": sum(entry["bytes"] for entry in facts["files"].values()),
                "path": str(one.path),
            }
        )
    return found


def rows_of_listing(found: Sequence[Mapping[str, Any]]) -> Sequence[Sequence[str]]:
    """The same as a table with a header."""
    rows = [("release", "in use", "created", "run", "rules passed", "size", "model")]
    for one in found:
        size = f"{one['bytes'] / 2**20:,.1f} MiB"
        in_use, model = "yes" if one["in_use"] else "", str(one["model_sha256"])[:12]
        rows.append((one["release"], in_use, one["created"], one["run"], str(one["rules"]), size, model))
    return rows
