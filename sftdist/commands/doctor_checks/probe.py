"""What may die is tried in a process of its own: an import that crashes or hangs is a finding, not the doctor's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

FACTS = "facts: "  # begins the line that a probe has to say; what it imports may print lines of its own
SECONDS = 180.0  # for an import: a package folder on a cold network disk takes its time
_IMPORT = "import importlib, sys; importlib.import_module(sys.argv[1])"


@dataclass(frozen=True)
class Probe:
    """`facts`: the JSON object that the process printed; `error`: one line where it did not end well; `crashed`:
    it was ended by a signal or did not end; `seconds`: how long it took."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    crashed: bool = False
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Child:
    """A running command, and the files that take what it says."""

    process: subprocess.Popen[str]
    out: IO[str]
    err: IO[str]
    started: float

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where it has not ended `seconds` after its start."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(max(0.0, self.started + seconds - time.monotonic()))
        return None

    def output(self) -> str:
        self.out.seek(0)
        return self.out.read()

    def errors(self) -> str:
        self.err.seek(0)
        return self.err.read()

    def probe(self, seconds: float = SECONDS) -> Probe:
        """Wait for the end, and read what it said."""
        code = self.wait(seconds)
        if code is None:
            return Probe(error=f"did not end within {seconds:.0f} seconds", crashed=True)
        if code < 0:
            return Probe(error=f"crashed: the process was ended by {signal.Signals(-code).name}", crashed=True)
        if code > 0:
            return Probe(error=last_line(self.errors()) or f"ended with exit code {code}")
        said = [line for line in self.output().splitlines() if line.startswith(FACTS)]
        facts = json.loads(said[-1].removeprefix(FACTS)) if said else {}
        return Probe(facts=facts, seconds=time.monotonic() - self.started)


@contextmanager
def running(command: Sequence[str]) -> Iterator[Child]:
    """Start a command; its whole process group is gone when the block ends."""
    # Files, not pipes: nobody has to read them while it runs.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        try:
            yield Child(process, out, err, time.monotonic())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def module(name: str, *arguments: str) -> AbstractContextManager[Child]:
    """`python -m name arguments`, one of the probes here."""
    return running([sys.executable, "-m", f"sftdist.commands.doctor_checks.{name}", *arguments])


def importing(name: str) -> AbstractContextManager[Child]:
    """A process that imports a module and does nothing else."""
    return running([sys.executable, "-c", _IMPORT, name])


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
