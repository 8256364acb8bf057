"""A18: what `prepare` has made is all that a training job needs; it asks nobody on the network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.jobs import KEYS
from tests.e2e.workshop import environment, metrics, status

pytestmark = pytest.mark.timeout(600)
CUT_OFF = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
ASKS = "from huggingface_hub import model_info; model_info('nobody/nothing')"


def without_network(folder: Path, command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The command in a network of its own that has only itself, and what it asked the Hub and W&B there."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("no network: the commands ip and unshare are needed (iproute2, util-linux)")
    if subprocess.run([*CUT_OFF, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network: network namespaces are not allowed here")
    notes = folder / "asked"
    words = [*CUT_OFF, sys.executable, "-m", "tests.hub", str(notes), *command]
    here = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=here, capture_output=True, text=True, timeout=300, check=False)
    return done, notes.read_text().splitlines()


@pytest.mark.long
def test_training_on_prepared_data_asks_nobody(home: Path) -> None:
    """From the first line to the verified export, with W&B as it is by default."""
    words = [*KEYS, "launch.nproc=1", "zero.stage=1", "train.max_steps=2", "tracking.wandb=null", "run.dir=runs/alone"]
    done, asked = without_network(home, [sys.executable, "-m", "sftdist.cli", "train", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked == []
    assert status(home / "runs/alone")["state"] == "done"
    assert metrics(home / "runs/alone", "step") == [(1,), (2,)]


def test_who_does_ask_is_seen(tmp_path: Path) -> None:
    done, asked = without_network(tmp_path, [sys.executable, "-c", ASKS])
    assert done.returncode == 1
    assert "GET /api/models/nobody/nothing" in asked
