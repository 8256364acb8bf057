"""Two hosts on one machine: network namespaces with a cable between them that a test may cut and mend."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pytest

from tests.e2e.jobs import environments, ranks_among
from tests.e2e.workshop import environment

LINK = "veth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HOSTS = ("host-0", "host-1")
NAMESPACE_FILES = Path("/etc/netns")  # where `ip netns exec` looks for files that take the place of those in /etc


class Pair:
    """A command on each of two hosts, and what they print."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
        self.processes = processes
        self._logs = logs

    def until(self, what: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait for something to become true while both run."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.texts()
            assert all(process.poll() is None for process in self.processes), self.texts()
            time.sleep(0.05)

    def codes(self, within: float = 240.0) -> list[int]:
        """Wait for both; their exit codes."""
        deadline = time.monotonic() + within
        try:
            return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"they did not end within {within} s\n" + "\n\n".join(self.texts())) from None

    def texts(self) -> list[str]:
        """What each has printed so far."""
        return [(self._logs / str(rank)).read_text(errors="replace") for rank in range(2)]


class TwoHosts:
    """Context manager; skips the test, with the reason, where namespaces are not allowed. Nothing is left behind: no
    process, no namespace. Each host knows both by name, itself by 127.0.1.1 as Debian does."""

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
            self._name()
            self.mend()
        except subprocess.CalledProcessError as error:
            self.__exit__(None, None, None)
            pytest.skip(f"two hosts: network namespaces are not allowed here: {error.stderr.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host, name in enumerate(self.names):
            self.kill(self.processes(host))
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(NAMESPACE_FILES / name, ignore_errors=True)

    def processes(self, host: int) -> list[int]:
        """The process ids on a host."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=False)
        return [int(word) for word in found.stdout.split()]

    def ranks(self, host: int) -> list[int]:
        """Those of the ranks."""
        return list(ranks_among(environments(self.processes(host))).values())

    def kill(self, pids: Iterable[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self) -> None:
        """Pull the cable at the second host."""
        _ip("-n", self.names[1], "link", "set", LINK, "down")

    def mend(self) -> None:
        for name in self.names:
            _ip("-n", name, "link", "set", LINK, "up")

    def torchrun(self, arguments: Sequence[str], folder: Path, logs: Path) -> Pair:
        """One rank on each host: `torchrun ARGUMENTS` with the static rendezvous; output in `logs/0` and `logs/1`."""
        run = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
        meet = ("--master-addr", ADDRESSES[0], "--master-port", "29411")
        commands = [[*run, "--node-rank", str(rank), *meet, *arguments] for rank in range(2)]
        return self.start(commands, folder, logs, {"GLOO_SOCKET_IFNAME": LINK})

    def start(
        self, commands: Sequence[Sequence[str]], folder: Path, logs: Path, variables: Mapping[str, str] | None = None
    ) -> Pair:
        """A command on each host; output in `logs/0` and `logs/1`. A signal to a process reaches the command itself."""
        logs.mkdir(parents=True, exist_ok=True)
        here = {**environment(), **(variables or {})}
        processes: list[subprocess.Popen[bytes]] = []
        for rank, command in enumerate(commands):
            own = ["ip", "netns", "exec", self.names[rank], "unshare", "--uts", "sh", "-c"]
            words = [*own, f'hostname {HOSTS[rank]} && exec "$@"', "sh", *command]
            with (logs / str(rank)).open("wb") as file:
                process = subprocess.Popen(
                    words, cwd=folder, env=here, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            processes.append(process)
        return Pair(processes, logs)

    def listen(self, host: int, port: int) -> subprocess.Popen[bytes]:
        """A program that listens on a port of a host and says nothing."""
        program = "import socket, sys, time; s = socket.create_server(('', int(sys.argv[1]))); print(); time.sleep(600)"
        words = ["ip", "netns", "exec", self.names[host], sys.executable, "-uc", program, str(port)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"\n"
        return process

    def _name(self) -> None:
        for own, name in enumerate(self.names):
            folder = NAMESPACE_FILES / name
            folder.mkdir(parents=True)
            known = [(ADDRESSES[rank] if rank != own else "127.0.1.1", host) for rank, host in enumerate(HOSTS)]
            lines = [f"{address} {host}\n" for address, host in (("127.0.0.1", "localhost"), *known)]
            (folder / "hosts").write_text("".join(lines))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
