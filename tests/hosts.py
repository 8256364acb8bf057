"""Two hosts on one machine: network namespaces with a cable between them that a test may cut and mend."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pytest

LINK = "veth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class TwoHosts:
    """Context manager; skips the test, with the reason, where namespaces are not allowed. Nothing is left behind: no
    process, no namespace."""

    def __init__(self) -> None:
        word = uuid.uuid4().hex[:8]
        self.names = (f"sftdist-{word}-a", f"sftdist-{word}-b")

    def __enter__(self) -> TwoHosts:
        if shutil.which("ip") is None or shutil.which("unshare") is None:
            pytest.skip("two hosts: the commands ip and unshare are needed (iproute2, util-linux)")
        try:
            for name in self.names:
                _ip("netns", "add", name)
            here, there = self.names
            _ip("link", "add", LINK, "netns", here, "type", "veth", "peer", "name", LINK, "netns", there)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", LINK)
                _ip("-n", name, "link", "set", "lo", "up")
            self.mend()
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"two hosts: network namespaces are not allowed here: {error.stderr.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            for pid in self.processes(name):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def processes(self, name: str) -> list[int]:
        """The process ids in a namespace."""
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        return [int(word) for word in found.stdout.split()]

    def cut(self) -> None:
        """Pull the cable at the second host."""
        _ip("-n", self.names[1], "link", "set", LINK, "down")

    def mend(self) -> None:
        for name in self.names:
            _ip("-n", name, "link", "set", LINK, "up")

    def torchrun(self, arguments: Sequence[str], folder: Path, logs: Path) -> list[subprocess.Popen[bytes]]:
        """One rank on each host: `torchrun ARGUMENTS` with the static rendezvous; output in `logs/0` and `logs/1`."""
        logs.mkdir(parents=True, exist_ok=True)
        return [self._agent(rank, arguments, folder, logs / str(rank)) for rank in range(2)]

    def _agent(self, rank: int, arguments: Sequence[str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
        command = [
            *("ip", "netns", "exec", self.names[rank]),
            *("unshare", "--uts", "sh", "-c", f'hostname host-{rank} && exec "$@"', "sh"),
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--node-rank", str(rank), "--master-addr", ADDRESSES[0], "--master-port", "29411", *arguments),
        ]
        with log.open("wb") as file:
            return subprocess.Popen(
                command, cwd=folder, env=_environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )


def _environment() -> dict[str, str]:
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    return {**kept, "GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
