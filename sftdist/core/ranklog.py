"""Each rank's own log file, and the console, which shows rank 0 and the first failure.

Rank 0 keeps the console as it is, a terminal stays a terminal, and what Python prints is copied to its file. The other
ranks write to their files alone, by file descriptor: what libraries and child processes write is there, too.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO, cast

from sftdist.core.start import this_start

_HEADER = "=== "
_FATAL = "Fatal Python error"  # the first word of faulthandler, followed by the innermost frame
_TAIL_BYTES = 65536
_WIDTH = 400  # characters of a line of the tail
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x0c\x0e-\x1f]")

_console: TextIO | None = None  # of a rank whose standard streams are its file


def log_file(run_dir: Path, rank: int) -> Path:
    """Where rank `rank` of a run writes."""
    return run_dir / "log" / f"rank-{rank:05d}.log"


@contextmanager
def rank_log(run_dir: Path, attempt: int) -> Iterator[None]:
    """Give this rank of torchrun's its file for the length of a block; `attempt` (from 1) is for the header line.

    An error that leaves the block is in the file with its traceback. A file that cannot be opened costs the log of
    this rank, not the run.
    """
    path = log_file(run_dir, int(os.environ["RANK"]))
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+b", buffering=0))
            PlainLines(file).write(_end_of_a_cut_line(file) + _header(attempt))
        except OSError as error:
            tell(f"sftdist: rank {os.environ['RANK']} keeps no log of its own ({error})")
        else:
            stack.enter_context(_errors_in(file))
            stack.enter_context(_crashes_in(file))
            shown = _keeps_console()
            if not shown:
                stack.enter_context(_moved(file))
            stack.enter_context(_copied(file, shown=shown))
        yield


def tell(text: str) -> None:
    """Print to standard error and, on a rank whose standard error is its file, to the console before."""
    for stream in (_console, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # a full disk or a closed terminal must not hide it from the other of the two
                print(f"{fresh_line(stream)}{text}", file=stream, flush=True)


def note(text: str) -> None:
    """Write to this rank's log alone."""
    if isinstance(sys.stderr, Copied):
        sys.stderr.log.write(f"{text}\n")


def fresh_line(stream: TextIO) -> str:
    """What to print before a line on a terminal where a rank may have left its progress bar."""
    return "\r\x1b[K" if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" else ""


def last_words(run_dir: Path, rank: int, count: int = 10) -> list[str]:
    """The last lines of a rank's newest start, or the head of its last crash; none where there is no such file."""
    try:
        with log_file(run_dir, rank).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").rstrip("\n").split("\n")
    except OSError:
        return []
    start = max((number for number, line in enumerate(lines, 1) if line.startswith(_HEADER)), default=0)
    lines = [plain(line)[:_WIDTH] for line in lines[start:]]
    crash = next((number for number, line in enumerate(lines) if line.startswith(_FATAL)), None)
    if crash is None:
        return lines[-count:]
    first = max(0, crash - count // 3)  # with what was said right before
    return lines[first : first + count]


def plain(line: str) -> str:
    """What a terminal would show of a line in the end: without colours, and without what was overwritten."""
    return _CONTROL.sub("", line.rstrip("\r").rpartition("\r")[2])


class PlainLines:
    """Text into an unbuffered file: whole plain lines, each in one write, so that a kill costs the line under way.

    A disk that takes nothing costs lines of the log, and nothing else. A closed file takes nothing, either: a library
    may keep the stream of a run that has ended.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rest = ""
        self._lock = threading.RLock()  # a signal handler may print while its own thread prints

    def write(self, text: str) -> int:
        with self._lock:
            *whole, rest = (self._rest + text).split("\n")
            # A bar that overwrites itself for hours is one line.
            self._rest = rest if rest.endswith("\r") else rest.rpartition("\r")[2]
            if whole:
                data = "".join(plain(line) + "\n" for line in whole).encode("utf-8", "backslashreplace")
                with suppress(OSError, ValueError):
                    self._file.write(data)
        return len(text)

    def flush(self) -> None:
        """Whole lines are written already; half a line waits for its end."""

    def end(self) -> None:
        """Nothing more comes."""
        if self._rest:
            self.write("\n")


class Copied:
    """A standard stream of a rank, whose text goes to its log. In all else it is the `console` that it was made of.

    `show` takes the text to the console, too: a progress bar puts its own in, which prints above the bar.
    """

    def __init__(self, console: TextIO, log: PlainLines, *, shown: bool) -> None:
        self.console = console
        self.log = log
        self.show: Callable[[str], object] = console.write if shown else _nowhere

    def write(self, text: str) -> int:
        self.log.write(text)
        self.show(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


def takes_bar(out: IO[str] | Copied) -> bool:
    """A terminal that moves its cursor, whose user has not asked for plain text (NO_COLOR)."""
    return out.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown") and not os.environ.get("NO_COLOR")


def _nowhere(text: str) -> None:
    """Where a rank without a console shows what it prints."""


def _header(attempt: int) -> str:
    who = f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}"
    where = f"on {socket.gethostname()}, process {os.getpid()}, start {this_start()}, attempt {attempt}"
    return f"{_HEADER}{datetime.now(UTC).isoformat(timespec='seconds')} {who} {where}\n"


def _end_of_a_cut_line(file: BinaryIO) -> str:
    """A rank that was killed may have left half a line."""
    if not file.seekable() or file.seek(0, os.SEEK_END) == 0:
        return ""
    file.seek(-1, os.SEEK_END)
    return "" if file.read(1) == b"\n" else "\n"


def _keeps_console() -> bool:
    """Rank 0, and a rank whose console is its own already: a file of torchrun's --redirects, --tee or --log-dir."""
    if os.environ["RANK"] == "0":
        return True
    given = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull)).with_name("stdout.log")
    return given.is_file() and os.path.samestat(given.stat(), os.fstat(1))


@contextmanager
def _errors_in(file: BinaryIO) -> Iterator[None]:
    """A traceback of what ends the block, unless a session has said it: then the log holds it already."""
    try:
        yield
    except Exception as error:
        if not vars(error).get("reported"):
            PlainLines(file).write("".join(traceback.format_exception(error)))
        raise


@contextmanager
def _crashes_in(file: BinaryIO) -> Iterator[None]:
    """Where Python was when a native library crashed; a user's own faulthandler is left alone."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(file, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()


@contextmanager
def _copied(file: BinaryIO, *, shown: bool) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    out, err = copies = tuple(Copied(stream, PlainLines(file), shown=shown) for stream in before)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    _move_handlers(dict(zip(before, copies, strict=True)))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _move_handlers(dict(zip(copies, before, strict=True)))
        for copy in copies:  # a library that was imported meanwhile keeps it
            copy.log.end()
            copy.show = copy.console.write


def _move_handlers(new: Mapping[Any, Any]) -> None:
    """Libraries that were imported before log to the streams that they found then."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream in new:
                handler.setStream(new[handler.stream])


@contextmanager
def _moved(file: BinaryIO) -> Iterator[None]:
    """Standard output and error are the file, for libraries and child processes, too; `tell` reaches the console."""
    global _console
    kept = {number: os.dup(number) for number in (1, 2)}
    with open(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as console:
        _console = console
        _point(dict.fromkeys(kept, file.fileno()))
        try:
            yield
        finally:
            _console = None
            _point(kept)
            for descriptor in kept.values():
                os.close(descriptor)


def _point(targets: Mapping[int, int]) -> None:
    """Let file descriptors be what others are, once Python has written what it still held for them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    for number, target in targets.items():
        os.dup2(target, number)
