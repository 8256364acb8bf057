"""The log file of a rank, in processes of their own: file descriptors and crashes belong to a whole process."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from sftdist.core.ranklog import Copied, PlainLines, last_words, log_file, plain, rank_log
from tests.conftest import ROOT
from tests.terminal import Terminal

BEGIN = """
import faulthandler, logging, os, signal, subprocess, sys
from pathlib import Path
from sftdist.core.ranklog import rank_log, tell
logging.basicConfig()
run_dir = Path(sys.argv[1])
"""
TALK = """
print("before")
with rank_log(run_dir, 1):
    print("printed")
    print("an error", file=sys.stderr)
    logging.error("logged")
    os.write(1, b"native out\\n")
    os.write(2, b"native err\\n")
    subprocess.run(["echo", "of a child"])
    tell("the failure")
print("after")
"""
SAID = ["printed", "an error", "ERROR:root:logged", "native out", "native err", "of a child", "the failure"]


def rank(
    number: int, run_dir: Path, code: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A rank that runs `code`; its console is a pipe, in which Python holds back what is not flushed."""
    here = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(number), "WORLD_SIZE": "2", **(variables or {})}
    here.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(code), str(run_dir)],
        env=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )


def logged(run_dir: Path, number: int) -> list[str]:
    """The lines of a rank's log, the headers without what differs from start to start."""
    lines = log_file(run_dir, number).read_text().splitlines()
    return ["===" if line.startswith("=== ") else line for line in lines]


def test_rank_1_is_in_its_file_and_its_failure_on_the_console_too(tmp_path: Path) -> None:
    done = rank(1, tmp_path, TALK)
    assert logged(tmp_path, 1) == ["===", *SAID]
    assert done.stdout.splitlines() == ["before", "the failure", "after"]


def test_rank_0_is_on_the_console_and_what_python_says_in_its_file(tmp_path: Path) -> None:
    done = rank(0, tmp_path, TALK)
    assert logged(tmp_path, 0) == ["===", "printed", "an error", "ERROR:root:logged", "the failure"]
    assert sorted(done.stdout.splitlines()) == sorted(["before", *SAID, "after"])


def test_the_header_says_which_start_it_is(tmp_path: Path) -> None:
    code = "with rank_log(run_dir, 3): print(os.getpid())"
    rank(1, tmp_path, code, {"SFTDIST_START": "s1"})
    header, pid = log_file(tmp_path, 1).read_text().splitlines()
    assert header.startswith("=== 20")
    assert header.endswith(f"rank 1 of 2 on {os.uname().nodename}, process {pid}, start s1, attempt 3")


@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_costs_the_line_under_way_and_the_next_start_begins_a_new_one(tmp_path: Path, number: int) -> None:
    code = """
    with rank_log(run_dir, 1):
        print("whole")
        os.write(os.open(run_dir / "log" / "rank-00001.log", os.O_WRONLY | os.O_APPEND), b"half")
        print("lost", end="")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "rank-00001.log").touch()
    for _ in range(2):
        assert rank(number, tmp_path, code).returncode == -signal.SIGKILL
    once = ["===", "whole", "half"] if number else ["===", "whole"]
    assert logged(tmp_path, number) == once * 2


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_that_nobody_has_reported_is_in_the_file_and_left_to_the_caller(tmp_path: Path, number: int) -> None:
    done = rank(number, tmp_path, "with rank_log(run_dir, 1): raise ValueError('no data')")
    assert log_file(tmp_path, number).read_text().splitlines()[-1] == "ValueError: no data"
    assert done.stdout.count("ValueError: no data") == 1
    code = """
    try:
        with rank_log(run_dir, 1):
            error = ValueError("told")
            vars(error)["reported"] = True
            raise error
    except ValueError:
        pass
    """
    rank(number, tmp_path, code)
    assert logged(tmp_path, number)[-1] == "===", "a session has said it"


@pytest.mark.parametrize("number", [0, 1])
def test_a_crash_leaves_where_python_was(tmp_path: Path, number: int) -> None:
    code = """
    def copy_tensors():
        os.abort()
    with rank_log(run_dir, 1):
        [print("line", number) for number in range(30)]
        copy_tensors()
    """
    assert rank(number, tmp_path, code).returncode == -signal.SIGABRT
    words = last_words(tmp_path, number)
    assert words[:4] == ["line 27", "line 28", "line 29", "Fatal Python error: Aborted"]
    assert "in copy_tensors" in words[6]


def test_everything_is_given_back(tmp_path: Path) -> None:
    code = """
    handler = logging.root.handlers[0]
    before = sys.stdout, sys.stderr, handler.stream, os.fstat(1).st_ino
    with rank_log(run_dir, 1):
        late = logging.StreamHandler(sys.stdout)  # a library that is imported now keeps the stream of this run
    late.emit(logging.makeLogRecord({"msg": "late"}))
    assert before == (sys.stdout, sys.stderr, handler.stream, os.fstat(1).st_ino)
    assert not faulthandler.is_enabled()
    assert len(os.listdir("/proc/self/fd")) == 4, os.listdir("/proc/self/fd")
    """
    for number in (0, 1):
        done = rank(number, tmp_path, code)
        assert done.stdout.splitlines() == ["late"]
        assert logged(tmp_path, number) == ["==="]


@pytest.mark.parametrize("number", [0, 1])
def test_a_log_that_cannot_be_opened_hides_nothing(tmp_path: Path, number: int) -> None:
    (tmp_path / "log").touch()  # no folder
    done = rank(number, tmp_path, "with rank_log(run_dir, 1):\n  print('said')\n  tell('told')\n  1 / 0")
    first, *said = done.stdout.splitlines()
    assert f"rank {number} keeps no log of its own" in first
    assert os.strerror(errno.EEXIST) in first
    assert "said" in said
    assert said.count("told") == 1
    assert said.count("ZeroDivisionError: division by zero") == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_hides_nothing(tmp_path: Path, number: int) -> None:
    log_file(tmp_path, number).parent.mkdir()
    log_file(tmp_path, number).symlink_to("/dev/full")
    code = "with rank_log(run_dir, 1):\n  logging.error('logged')\n  tell('told')\n  raise ValueError('the cause')"
    done = rank(number, tmp_path, code)
    assert done.returncode == 1, "the exception's, not 120: what could not be flushed at the end"
    assert done.stdout.splitlines().count("told") == 1
    assert done.stdout.splitlines()[-1] == "ValueError: the cause"


def test_a_console_of_the_ranks_own_is_kept(tmp_path: Path) -> None:
    """torchrun --redirects and --tee: the user has asked for these files."""
    given = tmp_path / "torchrun" / "stdout.log"
    given.parent.mkdir()
    variables = {"TORCHELASTIC_ERROR_FILE": str(given.with_name("error.json"))}
    with given.open("w") as file:
        here = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1", **variables}
        subprocess.run(
            [sys.executable, "-c", BEGIN + TALK, str(tmp_path)], env=here, stdout=file, stderr=file, check=True
        )
    assert sorted(given.read_text().splitlines()) == sorted(["before", *SAID, "after"])
    assert logged(tmp_path, 1) == ["===", "printed", "an error", "ERROR:root:logged", "the failure"]
    given.write_text("")  # redirected in another attempt, not in this one
    assert rank(1, tmp_path, TALK, variables).stdout.splitlines() == ["before", "the failure", "after"]


def test_the_console_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with Terminal(80) as terminal:
        console = terminal.text()
        monkeypatch.setattr(sys, "stdout", console)
        handler = logging.StreamHandler(console)
        logging.getLogger("library").addHandler(handler)
        with rank_log(tmp_path, 1):
            assert isinstance(sys.stdout, Copied)
            assert (sys.stdout.isatty(), sys.stdout.fileno()) == (True, console.fileno())
            assert sys.stdout.encoding == console.encoding
            logging.getLogger("library").error("\x1b[31mred\x1b[0m")
            print("half a line", end="")
        assert sys.stdout is console
        assert handler.stream is console
        logging.getLogger("library").removeHandler(handler)
        console.close()
        terminal.close()
    assert terminal.output == "\x1b[31mred\x1b[0m\r\nhalf a line"
    assert logged(tmp_path, 0) == ["===", "red", "half a line"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("step 1", "step 1"),
        ("\x1b[32mgreen\x1b[0m and \x1b]8;;http://x\x1b\\a link\x1b]8;;\x07", "green and a link"),
        ("\r 10%\r 20%", " 20%"),
        ("windows\r", "windows"),
        ("a\tb\x07", "a\tb"),
        ("Grüße, 你好", "Grüße, 你好"),
    ],
)
def test_a_line_is_what_a_terminal_shows_in_the_end(line: str, shown: str) -> None:
    assert plain(line) == shown


def test_lines_are_whole_whatever_the_writes_were(tmp_path: Path) -> None:
    file = io.FileIO(tmp_path / "log", "ab")
    lines = PlainLines(file)
    for text in ("a", "b\n", "\r 1%", "\r 2%", "\r 99%\r", "\n", "c\nd\ne", "\ud800\n"):
        lines.write(text)
    assert (tmp_path / "log").read_text() == "ab\n 99%\nc\nd\ne\\ud800\n"
    file.close()
    assert lines.write("late\n") == 5


def test_last_words_are_those_of_the_newest_start(tmp_path: Path) -> None:
    assert last_words(tmp_path, 3) == []
    log_file(tmp_path, 3).parent.mkdir()
    old = "=== first\nold\nFatal Python error: Aborted\n"
    log_file(tmp_path, 3).write_text(old + "x" * 100_000 + "\n=== second\n")
    assert last_words(tmp_path, 3) == []
    log_file(tmp_path, 3).write_text(old + "=== second\n" + "".join(f"{n}\n" for n in range(20)) + "y" * 1000)
    assert last_words(tmp_path, 3) == [*map(str, range(11, 20)), "y" * 400]
