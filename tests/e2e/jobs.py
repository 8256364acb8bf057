"""Started jobs that a test may signal and kill: commands, their screens, and every process that belongs to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.conftest import ROOT
from tests.e2e.workshop import SMALL, environment, metrics
from tests.faults import train_to_the_end

EXACT = ("step", "loss", "grad_norm", "lr", "rows")
KEYS = (
    *("+exp=full", "model.path=model", "data.train=my.jsonl", *SMALL),
    *("precision=fp32", "zero.stage=2", "launch.nproc=2", "train.epochs=8"),
    *("train.startup_checks=false", "checkpoint.every_steps=10"),
)
TRAIN = (sys.executable, "-m", "sftdist.cli", "train")


def torchrun(*options: str, module: str = "sftdist.train") -> tuple[str, ...]:
    """A bare torchrun with its default flags, two ranks, and further options."""
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return (*run, *options, "-m", module)


class Running:
    """A command in `folder` with its screen in a file; all of its processes are gone when the block ends.

    They are found by a variable in their environment, so an orphan is found, too.
    """

    def __init__(self, command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self._job = uuid.uuid4().hex
        self._screen = folder / f"screen-{self._job[:8]}"
        here = {**environment(), "PYTHONPATH": str(ROOT), "SFTDIST_TEST_JOB": self._job, **(variables or {})}
        with self._screen.open("wb") as screen:
            self.process = subprocess.Popen(
                list(command), cwd=folder, env=here, stdout=screen, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.processes():
            self._signal(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def screen(self) -> str:
        """What the job has printed so far."""
        return self._screen.read_text(errors="replace")

    def processes(self) -> dict[int, dict[str, str]]:
        """The environment of every living process of this job, by process id."""
        everybody = environments(int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
        return {pid: here for pid, here in everybody.items() if here.get("SFTDIST_TEST_JOB") == self._job}

    def ranks(self) -> dict[int, int]:
        """The process id of every rank."""
        return ranks_among(self.processes())

    def agent(self) -> int:
        """The process id of torchrun's agent: the parent of the ranks."""
        return _parent(self.ranks()[0])

    def tell(self, number: signal.Signals, *pids: int) -> None:
        """Send a signal to processes of the job; without any to the command itself."""
        for pid in pids or (self.process.pid,):
            self._signal(pid, number)

    def until(self, condition: Callable[[], bool], seconds: float = 240.0) -> None:
        """Wait for something to become true while the job runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it has ended with {self.process.returncode}\n{self.screen}"
            assert time.monotonic() < deadline, f"it did not happen within {seconds} s\n{self.screen}"
            time.sleep(0.05)

    def until_step(self, run_dir: Path, step: int) -> None:
        """Wait for the figures of an optimizer step."""
        file = run_dir / "metrics.jsonl"
        self.until(lambda: file.is_file() and f'"step": {step},' in file.read_text())

    def end(self, seconds: float = 240.0) -> int:
        """Wait for the command; its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {seconds} s\n{self.screen}") from None

    def _signal(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def environments(pids: Iterable[int]) -> dict[int, dict[str, str]]:
    """The environment of those that live, by process id."""
    found = {}
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended, or is not ours to look at
            continue
        found[pid] = dict(word.split("=", 1) for word in words if "=" in word)
    return found


def ranks_among(processes: Mapping[int, Mapping[str, str]]) -> dict[int, int]:
    """The process id of every rank. What a rank has started is no rank."""
    ranks = {pid: int(here["RANK"]) for pid, here in processes.items() if "RANK" in here}
    return {rank: pid for pid, rank in ranks.items() if _parent(pid) not in ranks}


def finish(folder: Path, *overrides: str) -> str:
    """The same program to its end, on two ranks of a warm process; what it printed."""
    return train_to_the_end(2, [*KEYS, *overrides], folder)


def same(folder: Path, one: str, other: str) -> bool:
    """Whether two runs have the same figures in every step, bit by bit."""
    return metrics(folder / one, *EXACT) == metrics(folder / other, *EXACT) != []


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
