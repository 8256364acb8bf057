"""What a user sees: the console of a run and of a failure, and each rank's own log."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sftdist.core.agent import FAILED, PREEMPTED
from sftdist.core.config import compose
from sftdist.core.ranklog import log_file, rank_log
from sftdist.train import run
from sftdist.training.console import open_console
from tests.e2e.jobs import KEYS, TRAIN, Running, torchrun
from tests.e2e.workshop import environment, metrics, sftdist
from tests.talker import NATIVE
from tests.terminal import Terminal

TALKER = (sys.executable, "-m", "tests.talker")
HEADLINE = r"sftdist: error: rank 1 on {host} \(process \d+\) {what}"
RANK_1 = ["rank 1 prints", "rank 1 warns", "rank 1 logs", "rank 1 writes natively", "rank 1 has a child"]
BAR = re.compile(r" *\d+/\d+ [━╸╺]+ loss \d\.\d{4}  lr \S+  [\d,]+ tokens/s  left \d+:\d\d:\d\d")


def logged(run_dir: Path, rank: int) -> str:
    return log_file(run_dir, rank).read_text()


def last_lines(screen: str) -> list[str]:
    """From the last headline of a failure on."""
    return screen[screen.rindex("sftdist: error:") :].splitlines()


def headline(what: str) -> re.Pattern[str]:
    return re.compile(HEADLINE.format(host=re.escape(os.uname().nodename), what=what))


def test_a_restart_appends_and_the_last_lines_name_the_failure(tmp_path: Path) -> None:
    """Rank 1 raises, and after the restart a native library crashes."""
    run_dir = tmp_path / "run"
    with Running([*TALKER, str(run_dir), "fault,abort"], tmp_path) as job:
        assert job.end() == FAILED, job.screen
        screen = job.screen
    for line in RANK_1[:3]:
        assert line not in screen, "the console is rank 0's"
    for line in RANK_1:
        assert logged(run_dir, 1).count(line) == 2
    assert screen.count("rank 0 has a child") == 2
    assert [logged(run_dir, rank).count("=== ") for rank in (0, 1)] == [2, 2]
    assert "attempt 2" in logged(run_dir, 1)
    for text in (screen, logged(run_dir, 1)):
        assert len(headline("failed while starting: ValueError: a fault of ours").findall(text)) == 1
        assert text.count("Traceback") == 1
        assert text.count("\nValueError: a fault of ours") == 1
    first, *tail, where = last_lines(screen)
    assert headline("died while starting: ended by SIGABRT").fullmatch(first)
    assert tail[0] == "the last lines of its log:"
    assert len(tail) <= 11
    assert f"  | {NATIVE.decode().strip()}" in tail
    assert re.search(r"tests/talker.py\", line \d+ in end", "\n".join(tail))
    assert where == f"its log is {log_file(run_dir, 1)}; all of it is in {run_dir / 'log/failure.json'}"


@pytest.mark.long
def test_a_fault_after_a_restart_is_told_once_at_the_end(tmp_path: Path) -> None:
    """Rank 1 leaves without a word, and raises after the restart."""
    run_dir = tmp_path / "run"
    with Running([*TALKER, str(run_dir), "exit,fault"], tmp_path) as job:
        assert job.end() == FAILED, job.screen
        screen = job.screen
    assert not [line for line in RANK_1 if line in screen]
    first, *trace, where = last_lines(screen)
    assert headline("failed while starting: ValueError: a fault of ours").fullmatch(first)
    assert (trace[0], trace[-1]) == ("Traceback (most recent call last):", "ValueError: a fault of ours")
    assert where.startswith(f"its log is {log_file(run_dir, 1)}; ")
    assert headline("died while starting: it ended without a word").search(screen)
    for text in (screen, logged(run_dir, 1)):
        assert text.count(first) == 1
        assert text.count("Traceback") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "what", "tail"),
    [
        ("kill", "died while starting: ended by SIGKILL: someone or the kernel killed it", True),
        ("exit", "died while starting: ended with exit code 3", True),
        ("error", "failed while starting: say what to change", False),
    ],
)
def test_other_ends(tmp_path: Path, how: str, what: str, tail: bool) -> None:
    run_dir = tmp_path / "run"
    with Running([*TALKER, str(run_dir), how], tmp_path) as job:
        assert job.end() != 0, job.screen
        first, *more = last_lines(job.screen)
    assert headline(what).match(first)
    assert ("  | rank 1 has a child" in more) == tail
    assert more[-1].startswith(f"its log is {log_file(run_dir, 1)}")
    assert "Traceback" not in job.screen


@pytest.mark.long
def test_a_bare_torchrun_tells_the_failure_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Running([*torchrun(module="tests.talker"), str(run_dir), "fault"], tmp_path) as job:
        assert job.end() == 1, job.screen
        screen = job.screen
    assert not [line for line in RANK_1 if line in screen]
    assert screen.count("\nValueError: a fault of ours\n") == 1
    assert screen.count(f"its log is {log_file(run_dir, 1)}") == 1


@pytest.mark.long
def test_files_that_torchrun_was_told_to_write_hold_what_they_did(tmp_path: Path) -> None:
    run_dir, given = tmp_path / "run", tmp_path / "given"
    options = ("--nnodes", "1", "--tee", "3", "--log-dir", str(given))
    with Running([*torchrun(*options, module="tests.talker"), str(run_dir), "done"], tmp_path) as job:
        assert job.end() == 0, job.screen
        for line in RANK_1:
            assert re.search(rf"^\[\w+1\]:.*{line}", job.screen, re.MULTILINE), "--tee shows every rank"
    texts = "".join(path.read_text() for path in given.rglob("1/std*.log"))
    assert not [line for line in RANK_1 if line not in texts]
    for line in RANK_1[:3]:
        assert line in logged(run_dir, 1)


@pytest.mark.long
def test_a_run_of_one_process_keeps_its_streams(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    before = sys.stdout, sys.stderr, os.fstat(1).st_ino, os.fstat(2).st_ino
    run(compose("full", [*KEYS[1:], "train.epochs=null", "train.max_steps=1", "run.dir=runs/alone"]))
    assert before == (sys.stdout, sys.stderr, os.fstat(1).st_ino, os.fstat(2).st_ino)
    assert not list((home / "runs/alone/log").glob("rank-*"))


def test_what_is_said_under_a_bar_stands_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    figures = {"kind": "train", "loss": 2.5, "lr": 1e-4, "tokens_per_second": 2345.6, "step_seconds": 60.0}
    said = ["first", f"x/{'y' * 200}.json", "half and half", "[bold] :warning: 'text' 3.5"]
    with Terminal(80) as terminal:
        console = terminal.text()
        monkeypatch.setattr(sys, "stdout", console)
        monkeypatch.setattr(sys, "stderr", console)
        handler = logging.StreamHandler(console)
        logging.getLogger("library").addHandler(handler)
        with rank_log(tmp_path, 1):
            sinks = open_console(10, first_step=0)
            for step, line in enumerate(said[:2], 1):
                for sink in sinks:
                    sink.line({**figures, "step": step})
                print(line) if step == 1 else logging.getLogger("library").error(line)
            print("half and ", end="", file=sys.stderr)
            time.sleep(0.6)  # the bar is drawn anew
            print("half", file=sys.stderr)
            print(said[3])
            for sink in sinks:
                sink.line({"kind": "eval", "step": 2, "eval/loss": 2.0})
                sink.close("done")
            print("done")
        console.close()
        picture = terminal.close()
    logging.getLogger("library").removeHandler(handler)
    assert picture.cursor
    shown = picture.lines
    assert shown[0] == "first"
    assert "".join(shown[1:4]) == said[1], "broken by the terminal alone"
    assert shown[4:7] == [*said[2:], "eval at step 2: loss 2.0000"]
    assert BAR.fullmatch(shown[7])
    assert shown[7].endswith("2,346 tokens/s  left 0:08:00")
    assert shown[8:] == ["done", ""]
    lines = logged(tmp_path, 0).splitlines()[1:]
    assert [line for line in lines if not line.startswith("step ")] == [*said, "eval at step 2: loss 2.0000", "done"]
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/10", "2/10"]


def test_a_run_on_a_terminal_and_ctrl_c(home: Path) -> None:
    run_dir = home / "runs/terminal"
    command = [*TRAIN, *KEYS, "eval.every_steps=5", f"run.dir={run_dir}"]
    with Terminal(80) as terminal:
        process = terminal.start(command, home, {**environment(), "TERM": "xterm", "NO_COLOR": ""})
        try:
            until(lambda: len(shown_steps(terminal)) > 1 and is_at(run_dir, 5), process, terminal)
            terminal.press(b"\x03")
            assert process.wait(60) == PREEMPTED, terminal.output
            assert terminal.unchanged
        finally:
            process.kill()
        picture = terminal.close()
    assert picture.cursor
    assert picture.at_line_start
    bars = [line for line in picture.lines if "━" in line]
    assert len(bars) == 1, "the bar is one line, which is drawn anew:\n" + "\n".join(picture.lines)
    assert BAR.fullmatch(bars[0])
    assert picture.lines[-2].startswith("stopped after step ")
    assert "stopping after this step, with everything saved (Ctrl-C)" in "".join(picture.lines)
    assert "death signal" not in terminal.output
    lines = logged(run_dir, 0).splitlines()
    assert not [line for line in lines if "\x1b" in line or "\r" in line or "━" in line]
    assert any(line.startswith("step 1/") for line in lines)
    assert {line for line in picture.lines if line.startswith(("eval ", "stopped "))} <= set(lines)
    assert logged(run_dir, 1).count("\n") == 1, "rank 1 had nothing to say"


@pytest.mark.long
@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_plain_lines_where_they_are_asked_for(home: Path, variables: dict[str, str]) -> None:
    keys = [*KEYS, "train.epochs=null", "train.max_steps=3", f"run.dir=runs/plain-{len(variables)}"]
    with Terminal(80) as terminal:
        process = terminal.start([*TRAIN, *keys], home, {**environment(), **variables})
        assert process.wait(240) == 0, terminal.output
        terminal.close()
    assert "\x1b" not in terminal.output
    assert re.search(r"^step 3/3  loss", terminal.output, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("keys", [("tune=lora", "zero.stage=3"), ("zero.stage=3",)])
def test_the_console_of_two_ranks_holds_what_concerns_the_user(home: Path, keys: tuple[str, ...]) -> None:
    run_dir = home / f"runs/console-{len(keys)}"
    done = sftdist(["train", *KEYS, "train.epochs=null", "train.max_steps=2", *keys, f"run.dir={run_dir}"], home)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Warning" not in done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == len(set(lines)), "nothing is said twice"
    assert logged(run_dir, 1).count("\n") == 1


def shown_steps(terminal: Terminal) -> set[str]:
    """The steps at which a bar was drawn over the one before."""
    return set(re.findall(r"\r\x1b\[2K\x1b\[\d+m *(\d+)/", terminal.output))


def is_at(run_dir: Path, step: int) -> bool:
    return (run_dir / "metrics.jsonl").is_file() and (step,) in metrics(run_dir, "step")


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], terminal: Terminal) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, f"it has ended\n{terminal.output}"
        assert time.monotonic() < deadline, f"it did not happen in time\n{terminal.output}"
        time.sleep(0.05)
