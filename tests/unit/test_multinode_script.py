"""launch/multinode.sh before it starts anything, and what it would start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.scripts import script_variables

SCRIPT = ROOT / "launch/multinode.sh"
GIVEN = {"NODES": "2", "ADDRESS": "10.0.0.1:29500"}


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in (*GIVEN, "NODE_RANK")}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], env={**kept, **variables}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ([], {}, "NODES: given '', required how many nodes"),
        (["+exp=full"], {**GIVEN, "NODES": "two"}, "NODES: given 'two'"),
        (["--nodes", "0"], GIVEN, "NODES: given '0'"),
        (["--address", "10.0.0.1"], GIVEN, "ADDRESS: given '10.0.0.1', required HOST:PORT"),
        (["--node-rank", "-1"], GIVEN, "NODE_RANK: given '-1', required a number from 0 to 1, or nothing"),
        (["+exp=full", "--nodes"], GIVEN, "--nodes: given nothing"),
    ],
)
def test_what_is_missing_is_named(words: list[str], variables: dict[str, str], message: str) -> None:
    done = run(*words, **variables)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[0]
    assert "Usage, on every node" in done.stderr
    assert done.stdout == ""


def test_help() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "NODE_RANK" in done.stdout


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (["+exp=x"], GIVEN, ["+exp=x", "launch.nodes=2", 'launch.address="10.0.0.1:29500"']),
        (
            ["--node-rank", "1", "+exp=x", "--nodes", "3", "run.note='a  b'"],
            GIVEN,
            ["+exp=x", "run.note='a  b'", "launch.nodes=3", 'launch.address="10.0.0.1:29500"', "launch.node_rank=1"],
        ),
        (["--address", "[fe80::1]:29500"], GIVEN, ["launch.nodes=2", 'launch.address="[fe80::1]:29500"']),
    ],
)
def test_what_it_starts(tmp_path: Path, words: list[str], variables: dict[str, str], expected: list[str]) -> None:
    """Each word of the caller as it was, and an option before a variable."""
    own = script_variables(tmp_path)
    program = Path(own["SFTDIST_VENV"], "bin/sftdist")
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    done = run(*words, **variables, **own)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["train", *expected]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", "-x", str(SCRIPT)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""
