"""The scripts of launch/, run by tests with the interpreter that runs the tests: nothing is installed."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path

from tests.conftest import ROOT


def script_variables(folder: Path) -> dict[str, str]:
    """What makes launch/venv.sh take an environment made in `folder`: the program `sftdist` of this checkout, marked as
    installed from the files that are there now."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin/activate").write_text(f"PATH={shlex.quote(str(venv / 'bin'))}:$PATH\n")
    for name, words in {"python": (), "sftdist": ("-m", "sftdist.cli")}.items():
        program = venv / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
        program.chmod(0o755)
    files = (ROOT / "pyproject.toml", ROOT / "launch/constraints.txt")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    (venv / "sftdist-dev").write_text(f"{digest[:16]} {ROOT}\n")
    return {"SFTDIST_VENV": str(venv), "PYTHONPATH": str(ROOT)}
