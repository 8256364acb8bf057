"""A terminal in a test: a pseudo terminal whose output is kept, and what a person would see on it."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

_PIECES = re.compile(r"\x1b\[([0-?]*)([@-~])|(.)", re.DOTALL)


class Picture:
    """The lines that a terminal of `columns` shows after some output, and whether its cursor is to be seen."""

    def __init__(self, columns: int, output: str) -> None:
        self._columns = columns
        self._rows: list[list[str]] = [[]]
        self._row = self._column = 0
        self.cursor = True
        for argument, command, character in _PIECES.findall(output):
            if command:
                self._control(command, argument)
            else:
                self._put(character)

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._rows]

    @property
    def at_line_start(self) -> bool:
        return self._column == 0

    def _control(self, command: str, argument: str) -> None:
        if command == "K":
            self._rows[self._row][0 if argument == "2" else self._column :] = []
        elif command == "A":
            self._row -= int(argument or 1)
        elif argument == "?25":
            self.cursor = command == "h"
        else:
            assert command == "m", f"a command that this terminal does not know: {argument}{command}"

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
            return
        if character == "\n" or self._column == self._columns:
            self._row, self._column = self._row + 1, 0 if character != "\n" else self._column
            self._rows += [[]] * 0 if self._row < len(self._rows) else [[]]
        if character != "\n":
            row = self._rows[self._row]
            row += [" "] * (self._column + 1 - len(row))
            row[self._column] = character
            self._column += 1


class Terminal:
    """A pseudo terminal of `columns`. `file`: its end for a process."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file = os.fdopen(theirs, "r+b", buffering=0)
        self._settings = termios.tcgetattr(theirs)
        self._output = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def text(self) -> TextIO:
        """Its end for this process, as Python's standard streams are."""
        return io.TextIOWrapper(os.fdopen(os.dup(self.file.fileno()), "wb", buffering=0), write_through=True)

    def start(self, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A command whose terminal this is."""
        return subprocess.Popen(
            list(command),
            cwd=folder,
            env=dict(variables),
            stdin=self.file,
            stdout=self.file,
            stderr=self.file,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    @property
    def output(self) -> str:
        """All that came so far."""
        return self._output.decode("utf-8", "replace")

    @property
    def unchanged(self) -> bool:
        """Whether its settings (echo, line mode, ...) are what they were."""
        return self._settings == termios.tcgetattr(self._ours)

    def close(self) -> Picture:
        """What it shows in the end."""
        if not self.file.closed:
            self.file.close()
            self._reader.join(10)
            os.close(self._ours)
        return Picture(self._columns, self.output)

    def _read(self) -> None:
        with suppress(OSError):  # the last process has closed it
            while data := os.read(self._ours, 65536):
                self._output += data
