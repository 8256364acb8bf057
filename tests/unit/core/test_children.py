from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sftdist.core.children import Children

# Writes each stop signal that it gets into its file, and ends half a second after the last one.
LISTENER = """
import pathlib, signal, sys, time
file = pathlib.Path(sys.argv[1])
heard = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
file.write_text("ready")
until = time.monotonic() + 20
while time.monotonic() < until:
    time.sleep(0.02)
    if heard:
        time.sleep(0.5)
        break
file.write_text(" ".join(heard))
"""


def listen(children: Children, file: Path) -> None:
    children.start([sys.executable, "-c", LISTENER, str(file)], os.environ)
    while not file.exists() or file.read_text() != "ready":
        time.sleep(0.02)


def heard(file: Path) -> list[str]:
    until = time.monotonic() + 20
    while file.read_text() in ("", "ready"):
        assert time.monotonic() < until, "nothing was heard"
        time.sleep(0.02)
    return file.read_text().split()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM], ["SIGTERM"]),  # a cluster signals often
        ([signal.SIGINT, signal.SIGINT], ["SIGINT", "SIGINT"]),  # a second Ctrl-C means now
        ([signal.SIGUSR1, signal.SIGINT], ["SIGUSR1"]),
    ],
)
def test_each_child_hears_of_a_stop_once(tmp_path: Path, sent: list[int], expected: list[str]) -> None:
    files = [tmp_path / name for name in "ab"]
    with Children() as children:
        for file in files:
            listen(children, file)
        for number in sent:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert next(iter(children.seen)) == sent[0]
        assert [heard(file) for file in files] == [expected, expected]


def test_a_child_that_starts_after_the_signal_hears_of_it_and_handlers_go_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    first: list[int] = []
    with Children(first.append) as children:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        child = children.start([sys.executable, "-c", "import time; time.sleep(20)"], os.environ)
        assert child.wait(10) == -signal.SIGTERM
    assert first == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
