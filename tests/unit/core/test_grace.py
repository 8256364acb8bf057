"""A9: a save has to fit into what torchrun leaves after a signal, so that is read as torchrun reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sftdist.core.grace import TORCHRUN_SECONDS, shutdown_timeout, torchrun_grace
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("words", "environment", "seconds"),
    [
        (["torchrun", "--nproc-per-node", "2"], {}, TORCHRUN_SECONDS),
        (["torchrun", "--shutdown-timeout", "90"], {"PET_SHUTDOWN_TIMEOUT": "50"}, 90.0),
        (["torchrun", "--shutdown_timeout=90"], {}, 90.0),
        (["torchrun"], {"PET_SHUTDOWN_TIMEOUT": "50", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "40"}, 50.0),
        (["torchrun"], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "40"}, 40.0),
    ],
)
def test_command_line_before_environment(words: list[str], environment: dict[str, str], seconds: float) -> None:
    assert shutdown_timeout(words, environment) == seconds


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_grace() is None


def test_under_a_real_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", "77"]
    subprocess.run([*command, "-m", "tests.children", "grace", str(tmp_path)], cwd=ROOT, env=os.environ, check=True)
    assert float((tmp_path / "grace").read_text()) == 77.0
