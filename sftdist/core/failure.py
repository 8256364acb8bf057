"""The first failure of a run: what is known of it, in a file of the run directory and on the screen's last lines."""

from __future__ import annotations

import os
import socket
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from sftdist.core.errors import SftdistError, StartupError, TrainingError
from sftdist.core.progress import Activity
from sftdist.core.ranklog import log_file, tell
from sftdist.core.start import this_start
from sftdist.core.storage import read_json, write_json

FILE = Path("log", "failure.json")
ERROR, KILLED, LOST, STALLED = "error", "killed", "lost", "stalled"
_HAPPENED = {ERROR: "failed", KILLED: "died", LOST: "was lost", STALLED: "stands still"}
_ROWS_SHOWN = 10
_CAUSE_SHOWN = 300  # characters


@dataclass(frozen=True)
class Failure:
    """`rank`, `host`, `pid`: whose it is; `kind`: error, killed, lost or stalled; `step`, `phase`, `rows`: what that
    rank was doing (a step counted from 1, the row ids of all ranks); `message`: the reason, and what to change;
    `traceback`: of the exception or of the main thread ("" where there is none); `code`: the exit code it stands for;
    `retry`: whether another try may end otherwise; `time`: UTC, ISO 8601; `start`: the start of the agent."""

    rank: int
    host: str
    pid: int
    kind: str
    step: int | None
    phase: str
    rows: tuple[str, ...]
    message: str
    traceback: str
    code: int
    retry: bool
    time: str
    start: str | None
    expected: bool = False  # an error that says what to change: its traceback is for the file, not for the screen


def failure_of(error: BaseException, rank: int, doing: Activity) -> Failure:
    """What an exception on this rank means for the run."""
    expected = isinstance(error, SftdistError)
    return replace(
        here(ERROR, rank, doing, str(error) if expected else _named(error)),
        traceback="".join(traceback.format_exception(error)),
        code=error.exit_code if isinstance(error, SftdistError) else 1,
        retry=not isinstance(error, TrainingError | StartupError),
        expected=expected,
    )


def here(kind: str, rank: int, doing: Activity, message: str) -> Failure:
    """A failure of this process, now; another try may end otherwise."""
    return Failure(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        kind=kind,
        step=doing.step,
        phase=doing.phase,
        rows=doing.rows,
        message=message,
        traceback="",
        code=1,
        retry=True,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        start=this_start(),
    )


def write_failure(run_dir: Path, failure: Failure) -> None:
    """Replace `run_dir/log/failure.json`."""
    (run_dir / FILE).parent.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / FILE, asdict(failure))


def read_failure(run_dir: Path) -> Failure | None:
    """The run's last failure, or None where none was written."""
    if not (run_dir / FILE).is_file():
        return None
    fields = read_json(run_dir / FILE)
    return Failure(**{**fields, "rows": tuple(fields["rows"])})


def lines(failure: Failure, run_dir: Path | None = None) -> list[str]:
    """What is said of a failure: who, where, the reason; the traceback of a fault of ours, the first rows, files."""
    said = [f"{_who(failure)}: {failure.message}"]
    if failure.traceback and not failure.expected:
        said += failure.traceback.rstrip().split("\n")
    if failure.rows and failure.rows[0] not in failure.message:
        more = len(failure.rows) - _ROWS_SHOWN
        said.append(f"rows of that step: {', '.join(failure.rows[:_ROWS_SHOWN])}{f' and {more} more' * (more > 0)}")
    if run_dir is not None:
        said.append(where(failure, run_dir))
    return said


def headline(failure: Failure) -> str:
    """Who failed, where, and the first line of the reason, where all of it has been said before."""
    first, *more = failure.message.split("\n")
    short = first if len(first) <= _CAUSE_SHOWN and not more else f"{first[:_CAUSE_SHOWN]} ..."
    return f"{_who(failure)}: {short}"


def where(failure: Failure, run_dir: Path) -> str:
    """The files that say more."""
    log = log_file(run_dir, failure.rank)
    return f"its log is {log}; " * log.is_file() + f"all of it is in {run_dir / FILE}"


def print_failure(failure: Failure, run_dir: Path | None = None) -> None:
    """The default report: the console and the log of this rank. Of a single process nobody asks which rank it was: an
    error outside of a step that says what to change is said alone, and any other's traceback is left to whoever
    catches it."""
    alone = "RANK" not in os.environ
    if alone and failure.expected and failure.step is None and failure.pid == os.getpid():
        tell(f"sftdist: error: {failure.message}")
        return
    shown = replace(failure, traceback="") if failure.kind == ERROR and alone else failure
    tell("\n".join(lines(shown, None if alone else run_dir)))


def _who(failure: Failure) -> str:
    who = f"rank {failure.rank} on {failure.host} (process {failure.pid}) {_HAPPENED[failure.kind]}"
    return f"sftdist: error: {who} {_while(failure)}"


def _while(failure: Failure) -> str:
    return f"while {failure.phase}" if failure.step is None else f"in step {failure.step}, {failure.phase}"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
