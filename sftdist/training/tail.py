"""What a process needs that follows a run from outside: the lines of a growing file, and how the run ended."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.5


class Tail:
    """Reads the whole lines that were appended to a file since the last look."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self.offset = path, offset

    def lines(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self.offset)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                self.offset += len(text)
                yield json.loads(text)


def final_state(parent: int) -> str:
    """Wait a moment; then the state that the trainer wrote to us, "crashed" if it is gone, "" if it goes on."""
    ready, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
    if ready:
        return sys.stdin.readline().strip() or "crashed"
    return "" if os.getppid() == parent else "crashed"
