"""What W&B keeps of a run offline, read by W&B's own reader, and a W&B server that never answers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Records = list[tuple[str, dict[str, Any]]]  # kind and content, in the order of the file


def runs_of(run_dir: Path) -> list[Path]:
    """The folder that each start of the run has made, the first one first."""
    return sorted((run_dir / "wandb").glob("*run-*"), key=lambda path: path.name)


def read(folder: Path) -> Records:
    """Everything in the transaction log of one start."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [json.loads(line) for line in text.splitlines()]
    return [(record["type"], record[record["type"]]) for record in found if record["type"] in record]


def of_kind(records: Records, kind: str) -> list[dict[str, Any]]:
    return [content for name, content in records if name == kind]


def history(records: Records) -> list[dict[str, Any]]:
    """The logged figures, one dictionary a line."""
    return [record["item"] for record in of_kind(records, "history")]


@contextmanager
def silent_server() -> Iterator[tuple[str, list[Any]]]:
    """A loopback address that accepts connections and never answers; and the connections it has seen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen: list[Any] = []

        def accept() -> None:
            while True:
                try:
                    seen.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
        server.shutdown(socket.SHUT_RDWR)


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    """Whether it happens within that time."""
    deadline = time.monotonic() + seconds
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.05)
    return happens()
