"""A rank in 20 lines, without torch: `python -m tests.saver RUN_DIR [CODE | kill]`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

folder = Path(sys.argv[1])
end = sys.argv[2] if len(sys.argv) > 2 else "wait"


def status(state: str, code: int) -> None:
    text: dict[str, object] = {"state": state, "code": code, "reason": "because", "step": 3, "rank": 0, "retry": True}
    text["start"] = os.environ["SFTDIST_START"]  # as agent.write_status does
    (folder / "status.json").write_text(json.dumps(text))


def save(number: int, frame: FrameType | None) -> None:
    with (folder / "signals").open("a") as file:
        file.write(f"{signal.Signals(number).name}\n")


if __name__ == "__main__":
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(name, save)
    (folder / "pid").write_text(str(os.getpid()))
    status("running", 1)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end != "wait":
        status("preempted" if end == "75" else "failed", int(end))
        sys.exit(0 if end == "75" else 1)
    while not (folder / "signals").exists():
        time.sleep(0.05)
    until = time.monotonic() + 3  # signals interrupt a sleep
    while time.monotonic() < until:
        time.sleep(0.05)
    status("preempted", 75)
