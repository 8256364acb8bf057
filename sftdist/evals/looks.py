"""Who looked at the holdout, a line each time, beside the data manifest: every look makes it a little less unseen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sftdist.core.storage import append_jsonl, read_jsonl

LOOKS = "holdout-looks.jsonl"


def look(store_dir: Path, model: Path) -> int:
    """Write down that a model is about to be asked the holdout's prompts; how often that was, this time included."""
    store_dir.mkdir(parents=True, exist_ok=True)
    append_jsonl(store_dir / LOOKS, [{"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "model": str(model)}])
    return len(looks(store_dir))


def looks(store_dir: Path) -> list[dict[str, Any]]:
    """All of them, the first one first."""
    file = store_dir / LOOKS
    return list(read_jsonl(file)) if file.is_file() else []
