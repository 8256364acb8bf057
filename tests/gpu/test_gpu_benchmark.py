"""The GPU benchmark with tiny shapes on a GPU: every row that a CPU cannot measure has its figures, too."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import ROWS
from tests.conftest import ROOT

pytestmark = pytest.mark.gpu


def test_the_tiny_set_runs_on_a_gpu(tmp_path: Path) -> None:
    words = ["--tiny", "--device", "cuda", "--out", str(tmp_path), "--budget", "280"]
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *words], cwd=ROOT, capture_output=True, text=True)
    (file,) = tmp_path.glob("*-gpu-tiny.json")
    figures = json.loads(file.read_text())["figures"]
    assert done.returncode == 0, done.stderr[-4000:]
    assert figures["device"] != "CPU"
    for row in ROWS:
        answer = figures["rows"][row.name]["answer"]
        assert "figures" in answer or "absent" in answer, (row.name, answer)
    for name in ("Llama-3.1-8B LoRA", "Qwen2.5-0.5B full"):
        trained = figures["rows"][name]["answer"]["figures"]
        assert trained["peak_bytes"] > 0
        assert math.isfinite(trained["tokens_per_second"])
    memory = figures["rows"]["memory"]["answer"]["figures"]
    assert memory["peak_bytes"] >= memory["standing_bytes"] > 0
    assert memory["activation_bytes"] > 0
    kernels = {one["backend"]: one for one in figures["rows"]["attention"]["answer"]["figures"]["rows"]}
    assert "forward_seconds" in kernels["torch_varlen"], kernels["torch_varlen"]
