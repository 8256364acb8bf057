"""Rows of the GPU benchmark in a process of their own, so that one that fails or hangs costs nothing but itself.

The parent writes one job a line (JSON) to the child's standard input; the child answers each with a line `RESULT` and
JSON: `{"figures": ...}`, `{"absent": reason}` where something it needs is not there, or `{"error": first line}`.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT

MARK = "RESULT "
LEFT_BEHIND = 256 * 2**20  # bytes on the GPU after a row, beyond which the next row gets a fresh process
START_SECONDS = 90.0  # imports on a machine that has just been started
Job = dict[str, Any]
Answer = dict[str, Any]


class Absent(Exception):
    """A row that cannot be measured here, and why: no fault."""


def serve(handlers: Mapping[str, Callable[[Job], dict[str, Any]]]) -> None:
    """The child's loop: jobs from standard input until it closes; `job["kind"]` names the handler."""
    for line in sys.stdin:
        job = json.loads(line)
        answer = _answer(handlers[job["kind"]], job)
        answer["left_bytes"] = _cleared()
        sys.stdout.write(MARK + json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(handler: Callable[[Job], dict[str, Any]], job: Job) -> Answer:
    try:
        return {"figures": handler(job)}
    except Absent as reason:
        return {"absent": str(reason)}
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError, OSError) as error:
        # RuntimeError holds torch's own, out of memory among them; the others are what a foreign release with other
        # names gives. The row says so, and the rest goes on.
        traceback.print_exc()
        fatal = isinstance(error, torch.AcceleratorError)  # the process's context is lost
        return {"error": f"{type(error).__name__}: {first_line(error)}", "fatal": fatal}


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no words")[:300]


def _cleared() -> int:
    """Give back what the row held on the GPU; the bytes that it still holds."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


class Worker:
    """The parent's side: one child at a time, started anew after a fault, a leak, or a row that took too long."""

    def __init__(self, words: list[str], environment: Mapping[str, str] | None = None) -> None:
        self._words = words
        self._environment = {**os.environ, **(environment or {})}
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        folder = Path(tempfile.mkdtemp(prefix="gpu-benchmark-"))
        self._log = folder / "errors.txt"
        self.starts = 0

    def ask(self, job: Job, seconds: float, most: float = float("inf")) -> Answer:
        """The child's answer, or `{"error": ...}` where it ended or took longer than `seconds`, or than what a fresh
        child may take for its imports beside them; than `most` in no case."""
        fresh = self._child is None or self._child.poll() is not None
        child = self._start() if fresh else self._child
        assert child is not None
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
            answer = self._wait(min(most, seconds + (START_SECONDS if fresh else 0.0)))
        except BrokenPipeError:
            answer = self._ended()
        if answer.get("fatal") or answer.get("left_bytes", 0) > LEFT_BEHIND:
            self.close()
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self.starts += 1
        self._lines = queue.Queue()
        with self._log.open("a", encoding="utf-8") as errors:
            child = subprocess.Popen(
                self._words,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._child = child
        threading.Thread(target=_read, args=(child, self._lines), daemon=True).start()
        return child

    def _wait(self, seconds: float) -> Answer:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return {"error": f"no answer within {seconds:.0f} s; its process was ended"}
        return self._ended() if line is None else json.loads(line)

    def _ended(self) -> Answer:
        assert self._child is not None
        code = self._child.wait()
        text = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self.close()
        return {"error": f"its process ended with {code}: {text[-1][:300] if text else 'no words'}"}

    def errors(self) -> str:
        """What the children wrote to standard error."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.is_file() else ""

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(MARK):
            lines.put(line.removeprefix(MARK))
    lines.put(None)
