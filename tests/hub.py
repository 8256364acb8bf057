"""`python -m tests.hub NOTES COMMAND ...`: a command with a Hub and a W&B that have nothing and note who asks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE", "WANDB_API_KEY")


def main(notes: Path, command: list[str]) -> int:
    """The command's exit code; `notes` has a line for each request."""
    notes.touch()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            with notes.open("a") as file:
                file.write(f"{self.command} {self.path}\n")
            self.send_error(404)

        do_GET = do_POST = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the screen: it is the command's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    environment = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    own = {"HF_ENDPOINT": there, "WANDB_BASE_URL": there, "HF_HOME": str(notes.with_suffix(".home"))}
    return subprocess.run(command, env={**environment, **own}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
