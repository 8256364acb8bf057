"""`sftdist doctor` as a user runs it, on this machine and on this machine made worse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.e2e.workshop import SMALL, environment, metrics, model_folder, write_rows

UNDEFINED = "flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c105ErrorC2E"
DOCTOR = (sys.executable, "-m", "sftdist.cli", "doctor")


def run(
    command: list[str], folder: Path, variables: Mapping[str, str] | None = None, timeout: float = 200.0
) -> subprocess.CompletedProcess[str]:
    here = {**environment(), "PYTHONPATH": str(ROOT), **(variables or {})}
    return subprocess.run(command, cwd=folder, env=here, capture_output=True, text=True, timeout=timeout, check=False)


def found(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The findings of a run with --json, by name."""
    assert done.stdout, done.stderr
    given = json.loads(done.stdout)
    assert given["format"] == 1
    assert done.returncode == (1 if given["problems"] else 0)
    return {finding["name"]: finding for finding in given["findings"]}


def stub(folder: Path, package: str, code: str) -> Path:
    """A package whose import runs `code`, in a folder for PYTHONPATH, with the metadata of an installed one."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(code)
    metadata = folder / f"{package}-2.8.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 2.8.3\n")
    return folder


def without_compilers(folder: Path) -> dict[str, str]:
    """PATH with nothing on it that compiles: what a slim container has. And no CUDA_HOME."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("sh", "env", "uname", "git", "ps", "hostname"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    here = {"PATH": str(tools), "CUDA_HOME": "", "CUDA_PATH": ""}
    assert not any(shutil.which(name, path=str(tools)) for name in ("gcc", "cc", "c++", "g++", "nvcc", "ninja"))
    return here


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory, without a free byte."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    (path / "ballast").write_bytes(bytes(2**20))
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_this_machine_can_train(tmp_path: Path) -> None:
    """As text: what is said fits the screen, and the processes have really summed."""
    done = run([*DOCTOR], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PROBLEM" not in done.stdout
    lines = done.stdout.splitlines()
    assert all(len(line) <= 100 or " " not in line.strip() for line in lines)
    assert any(line.startswith("ok      collective    two processes were started") for line in lines)
    assert lines[-1].startswith("Training would run here.")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_with_all_that_can_be_broken(tmp_path: Path, full_disk: Path) -> None:
    """A25: an ABI mismatch of flash-attn; a full disk; no compiler. The doctor outlives all of them."""
    packages = stub(tmp_path / "site", "flash_attn", f"raise ImportError({UNDEFINED!r})")
    here = {"PYTHONPATH": f"{packages}:{ROOT}", **without_compilers(tmp_path)}
    done = run([*DOCTOR, "--json", "--skip-collective", "--dir", str(full_disk / "runs")], tmp_path, here)
    seen = found(done)
    flash = seen["flash-attn"]
    assert flash["state"] == "note"
    assert f"flash-attn 2.8.3 is installed, but cannot be imported: ImportError: {UNDEFINED}." in flash["found"]
    assert "built for another torch" in flash["found"]
    assert "auto passes it over and takes sdpa" in flash["found"]
    assert "auto would take sdpa" in seen["attention"]["found"]
    assert seen["runs-folder"]["state"] == "problem"
    assert "No space left on device; nothing free of 1 MiB" in seen["runs-folder"]["found"]
    assert "not on PATH: a C++ compiler, ninja" in seen["compiler"]["found"]
    assert seen["compiler"]["state"] == "ok"  # without a GPU nothing at all would need one
    assert seen["program"]["state"] == "ok"
    assert done.returncode == 1


def test_a_torch_that_is_broken_is_a_finding(tmp_path: Path) -> None:
    stub(tmp_path, "torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    seen = found(run([*DOCTOR, "--json"], tmp_path, {"PYTHONPATH": f"{tmp_path}:{ROOT}"}))
    assert "libcudart.so.13" in seen["torch"]["found"]
    broken = {"packages", "torch", "attention", "program"}  # packages: the stub's version is 2.8.3
    assert {name for name, finding in seen.items() if finding["state"] == "problem"} == broken


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrapped", "variables", "cause"),
    [
        ([], {"GLOO_SOCKET_IFNAME": "ib9"}, "GLOO_SOCKET_IFNAME=ib9 names no interface of this host"),
        (["unshare", "--net"], {}, "The loopback interface has no address"),
        (
            ["unshare", "--net", "--uts", "sh", "-c", 'ip link set lo up; hostname elsewhere; "$@"', "sh"],
            {},
            "The name of this host, elsewhere, resolves to no address",
        ),
    ],
)
def test_processes_that_cannot_work_together(
    wrapped: list[str], variables: dict[str, str], cause: str, tmp_path: Path
) -> None:
    """The last two hang inside of torch, and the doctor does not."""
    if wrapped and subprocess.run([*wrapped[:2], "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces are not allowed here")
    seen = found(run([*wrapped, *DOCTOR, "--json"], tmp_path, variables))
    assert seen["collective"]["state"] == "problem"
    assert "cannot work together" in seen["collective"]["found"]
    assert cause in seen["collective"]["advice"]


@pytest.mark.long
def test_training_without_compiler_cuda_and_a_whole_flash_attn(tmp_path: Path) -> None:
    """A24, A25: ranks, ZeRO with an offloaded optimizer and an export need no compiler; a broken flash-attn is passed
    over, which is said; asked for, it is refused before anything trains."""
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "my.jsonl", 40)
    packages = stub(tmp_path / "site", "flash_attn", f"raise ImportError({UNDEFINED!r})")
    here = {
        "PYTHONPATH": f"{packages}:{ROOT}",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),  # nothing that was compiled before helps
        **without_compilers(tmp_path),
    }
    keys = ["+exp=full", "model.path=model", "data.train=my.jsonl", "launch.nproc=2", "train.max_steps=2", *SMALL]
    train = [sys.executable, "-m", "sftdist.cli", "train", *keys, "zero.stage=2", "zero.offload=optimizer"]
    done = run([*train, "run.dir=runs/a"], tmp_path, here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(metrics(tmp_path / "runs/a", "loss")) == 2
    assert f"attention: sdpa (flash_attn cannot be imported: {UNDEFINED} (sftdist doctor" in done.stdout
    assert not (tmp_path / "extensions").exists()

    refused = run([*train, "run.dir=runs/b", "model.attention=flash_attn"], tmp_path, here)
    assert refused.returncode == 2
    assert f"model.attention=flash_attn: flash_attn cannot be imported: {UNDEFINED}" in refused.stderr
    assert "sftdist doctor says what would fit" in refused.stderr


def test_help_says_what_the_exit_code_means(tmp_path: Path) -> None:
    done = run([*DOCTOR, "--help"], tmp_path)
    assert "Exit code: 0 without a problem, else 1." in " ".join(done.stdout.split())
    assert "doctor" in run([sys.executable, "-m", "sftdist.cli"], tmp_path).stdout
    assert os.listdir(tmp_path) == []
