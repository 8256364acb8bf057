from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "slurm").iterdir())
STAGES = [path for path in SCRIPTS if path.suffix == ".sbatch"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("path", STAGES, ids=str)
def test_a_script_asks_for_itself_where_it_came_from(path: str) -> None:
    """Its own name stands in the line that finds the folder; the options stand before the first command."""
    lines = (ROOT / path).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    [finds] = [line for line in lines if "scontrol show job" in line]
    assert f"/slurm/{ROOT.joinpath(path).stem}\\.sbatch" in finds
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    usage = [line for line in lines[:first_command] if "sbatch " in line and "slurm/" in line]
    assert usage, "the head says how it is called"
