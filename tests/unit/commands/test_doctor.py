"""What the doctor makes of facts: whole screens of five machines, and each finding that these do not show."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from sftdist.commands.doctor import findings
from sftdist.commands.doctor_checks import (
    attention,
    folders,
    gpus,
    host,
    network,
    probe,
    program,
    surroundings,
    versions,
)
from sftdist.commands.doctor_checks.attention import Attention, Flash
from sftdist.commands.doctor_checks.finding import GIB, Finding, State, as_json, ok, problem, render
from sftdist.commands.doctor_checks.folders import Folder
from sftdist.commands.doctor_checks.gpus import Card, Driver, Torch
from sftdist.commands.doctor_checks.network import Collective, Network
from sftdist.commands.doctor_checks.probe import Probe
from sftdist.commands.doctor_checks.surroundings import Surroundings
from sftdist.commands.doctor_checks.versions import Versions
from tests.unit.commands.doctor_machines import GOLDEN, MACHINES, eight_h100, flash_attn_broken, no_gpu, topology

CUDA = flash_attn_broken().torch
SERVER = flash_attn_broken().driver
WIRED = Network("box", ("10.0.0.5",), {"lo": ("127.0.0.1",), "eth0": ("10.0.0.5",)})


def one(found: Iterable[Finding], name: str) -> Finding:
    return next(finding for finding in found if finding.name == name)


# The whole screen


@pytest.mark.parametrize("name", MACHINES)
def test_the_whole_screen(name: str) -> None:
    text = render(findings(MACHINES[name]()))
    assert text == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100


def test_a_problem_is_seen_in_the_verdict_and_in_the_numbers() -> None:
    found = [ok("one", "good"), problem("two", "bad", "mend it\n    mend --it " + "x" * 100)]
    assert render(found).splitlines() == [
        "ok      one           good",
        "PROBLEM two           bad",
        "                      -> mend it",
        "                         mend --it " + "x" * 100,
        "",
        "Training would NOT run here as it should. To mend first: two.",
    ]
    given = json.loads(json.dumps(as_json(found)))
    assert (given["format"], given["problems"], given["notes"]) == (1, 1, 0)
    assert [finding["state"] for finding in given["findings"]] == ["ok", "problem"]
    assert set(given["findings"][0]) == {"name", "state", "found", "advice"}


def test_names_are_unique_and_stay_the_same() -> None:
    names = [finding.name for finding in findings(eight_h100())]
    assert names == [
        *("python", "packages", "torch", "gpus", "links", "attention", "flash-attn", "kernels", "qlora"),
        *("program", "compiler"),
        *("host-name", "collective", "runs-folder", "stores-folder", "hub-cache", "shared-memory", "host", "limits"),
        *("clock", "variables", "slurm", "hub"),
    ]


# Versions


def test_a_package_that_is_absent_too_old_or_too_new() -> None:
    bounds = {"torch": ">=2.11", "numpy": "<3,>=1.26", "peft": "<0.22,>=0.20", "rich": ">=13", "jinja2": ">=3.1"}
    there = {"torch": "2.9.1+cu128", "numpy": "3.0.0", "rich": "13.0", "jinja2": "3.2.0rc1"}
    found = one(versions.findings(Versions("3.11.2", ">=3.11", bounds, there, ("torch",))), "packages")
    assert found.state == State.problem
    assert found.found.split("; ") == [
        "torch 2.9.1+cu128 is too old (required: >=2.11)",
        "numpy 3.0.0 is too new (required: <3,>=1.26)",
        "peft is not installed (required: <0.22,>=0.20)",
    ]
    assert found.advice == "    pip install 'torch>=2.11' 'numpy<3,>=1.26' 'peft<0.22,>=0.20'"


def test_a_python_outside_of_the_bounds() -> None:
    found = one(versions.findings(Versions("3.10.12", ">=3.11", {}, {}, ())), "python")
    assert (found.state, found.found) == (State.problem, "3.10.12 (required: >=3.11)")


def test_the_bounds_are_those_of_this_checkout() -> None:
    seen = versions.look()
    assert {"torch", "deepspeed", "transformers"} <= set(seen.shown) <= set(seen.required)
    assert "flash-attn" not in seen.required
    assert all(">=" in seen.required[name] for name in ("torch", "transformers"))


# torch, GPUs and links


@pytest.mark.parametrize(
    ("changed", "visible", "cuda", "words"),
    [
        ({"cuda": None, "version": "2.13.0+cpu"}, None, "13.0", ["built without CUDA", "would run on the CPU"]),
        ({}, "", "13.0", ["CUDA_VISIBLE_DEVICES is empty", "unset CUDA_VISIBLE_DEVICES"]),
        ({}, None, "12.4", ["too old: it serves CUDA up to 12.4", "built for CUDA 12"]),
        ({"why_no_gpu": "device busy"}, None, "13.0", ["CUDA says: device busy"]),
    ],
)
def test_gpus_that_torch_does_not_see(
    changed: dict[str, str], visible: str | None, cuda: str, words: list[str]
) -> None:
    torch = replace(CUDA, gpus=(), **changed)  # type: ignore[arg-type]
    found = one(gpus.findings(torch, replace(SERVER, cuda=cuda), visible), "torch")
    assert found.state == State.problem
    assert all(word in f"{found.found} {found.advice}" for word in words), found


@pytest.mark.parametrize(("computes", "advice"), [(True, ""), (False, "Train with precision=fp32")])
def test_a_cpu_that_only_emulates_bf16(computes: bool, advice: str) -> None:
    torch = Torch("2.13.0+cpu", cpu_bf16=computes)
    found = one(gpus.findings(torch, Driver(error="nvidia-smi is not here"), None), "gpus")
    assert found.state == State.note
    assert found.advice.startswith(advice)
    assert bool(found.advice) == (not computes)


def test_a_torch_that_cannot_be_imported() -> None:
    facts = replace(no_gpu(), torch=Torch.of(Probe(error="ImportError: libcudart.so.12: cannot open")))
    facts = replace(facts, attention=Attention.of(Probe(error="x")), loaded=Probe(error="x"), collective=None)
    found = findings(facts)
    assert {"torch", "attention", "program"} == {finding.name for finding in found if finding.state == State.problem}
    assert "libcudart.so.12" in one(found, "torch").found


def test_a_gpu_for_which_torch_has_no_code() -> None:
    def state(capability: str) -> State:
        gpu = {**CUDA.gpus[0], "capability": capability}
        return one(gpus.findings(replace(CUDA, gpus=(gpu,)), SERVER, None), "gpus").state

    assert [state(capability) for capability in ("8.0", "8.9", "9.0", "12.1", "13.0")] == [State.ok] * 5
    assert state("7.0") == State.problem  # the build begins at 7.5
    assert state("7.5") == State.note  # no bfloat16


def test_gpus_in_use_hidden_or_unlike() -> None:
    busy = replace(SERVER, cards=(Card("A100", 80000, 1, "8.0"), Card("A100", 80000, 70000, "8.0")))
    found = one(gpus.findings(CUDA, busy, None), "gpus")
    assert found.state == State.note
    assert "The machine has 2" in found.found
    assert found.found.endswith("already: GPU 1")
    unlike = replace(CUDA, gpus=(CUDA.gpus[0], {**CUDA.gpus[0], "name": "H100"}))
    assert one(gpus.findings(unlike, SERVER, None), "gpus").found.endswith("They are not alike")


@pytest.mark.parametrize(
    ("between", "state", "words"),
    [
        ("NV18", State.ok, "NVLink between all pairs"),
        ("SYS", State.note, "no NVLink; the GPUs exchange data over PCIe and the link between the processors"),
        ("PHB", State.note, "PCIe through the processor (PHB)"),
    ],
)
def test_links(between: str, state: State, words: str) -> None:
    found = one(
        gpus.findings(CUDA, replace(SERVER, cards=SERVER.cards * 4, topology=topology(4, between)), None), "links"
    )
    assert found.state == state
    assert words in found.found


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub in place of the driver's tool, which is absent here: how it is called, and that its failures are told."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def look(script: str) -> Driver:
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        return gpus.look()

    row = "NVIDIA L4, 23034, 12, 550.54.15, 8.9"
    matrix = "\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X "
    rows, header = f"echo '{row}'; echo '{row}'", "echo '| CUDA Version: 12.4 |'"
    script = f"case $1 in --query*) {rows};; topo) printf '{matrix}';; *) {header};; esac"
    card = Card("NVIDIA L4", 23034, 12, "8.9")
    assert look(script) == Driver((card, card), "550.54.15", "12.4", matrix)
    failing = look("echo 'NVIDIA-SMI has failed to reach the driver'; exit 9")
    found = one(gpus.findings(Torch(version="2"), failing, None), "gpus")
    assert found.state == State.problem
    assert "has failed to reach the driver" in found.found
    assert look("true").error == "nvidia-smi finds no GPU"


# flash-attn


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("a.so: undefined symbol: _ZN3c10", "built for another torch"),
        ("libcudart.so.12: cannot open shared object file", "built for another CUDA"),
        ("/lib/libc.so.6: version `GLIBC_2.32' not found", "build it here"),
        ("No module named 'einops'", "'einops'. model.attention=auto"),
    ],
)
def test_what_breaks_the_import_of_flash_attn(error: str, meaning: str) -> None:
    broken = Flash("2.8.3", f"ImportError: {error}")
    found = one(attention.findings(Attention("torch_varlen"), broken, CUDA), "flash-attn")
    assert found.state == State.note
    assert meaning in found.found
    assert "model.attention=flash_attn is refused" in found.found


def test_an_import_that_kills_the_process_would_kill_training_too() -> None:
    crash = Flash("2.8.3", "crashed: the process was ended by SIGSEGV", crashed=True)
    found = one(attention.findings(Attention("sdpa"), crash, CUDA), "flash-attn")
    assert found.state == State.problem
    assert "pip uninstall flash-attn" in found.advice


def test_the_wheel_that_fits() -> None:
    arm = Flash(python="cp313", platform="linux_aarch64")
    old = replace(CUDA, version="2.11.1+cu126", cuda="12.6", cxx11_abi=False)
    expected = "flash_attn-2.8.2+cu12torch2.11cxx11abiFALSE-cp313-cp313-linux_aarch64.whl"
    assert attention.wheel("2.8.2", arm, old) == expected
    without = one(attention.findings(Attention("sdpa"), Flash("2.8.3", "x"), Torch(version="2.13.0+cpu")), "flash-attn")
    assert without.advice == "pip uninstall flash-attn: no build of it fits a torch without CUDA."


def test_a_gpu_with_the_slow_attention_says_why() -> None:
    slow = Attention("sdpa", ("torch_varlen does not run on cuda: no kernel",))
    found = one(attention.findings(slow, Flash(), CUDA), "attention")
    assert found.state == State.note
    assert "no kernel" in found.found


# Compilers


def test_a_cuda_compiler_of_another_version() -> None:
    compilers = replace(flash_attn_broken().compilers, nvcc_version="12.4")
    found = one(program.findings(Probe(), CUDA, compilers), "compiler")
    assert found.state == State.note
    assert "but torch is built for CUDA 13.0" in found.found
    gone = replace(compilers, cuda_home="/opt/gone")
    assert "CUDA_HOME=/opt/gone, which is not there" in one(program.findings(Probe(), CUDA, gone), "compiler").found


def test_compilers_are_looked_for_on_the_path_and_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\n/bin/echo Cuda compilation tools, release 12.8, V12.8.93\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert program.look() == program.Compilers()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    seen = program.look()
    assert (seen.nvcc, seen.nvcc_version, seen.cuda_home_exists) == (str(nvcc), "12.8", True)


# Network


@pytest.mark.parametrize(
    ("seen", "stage", "cause"),
    [
        (
            replace(WIRED, chosen={"GLOO_SOCKET_IFNAME": "ib9"}),
            "connecting",
            "GLOO_SOCKET_IFNAME=ib9 names no interface",
        ),
        (replace(WIRED, chosen={"NCCL_SOCKET_IFNAME": "ib,en"}), "connecting", "NCCL_SOCKET_IFNAME=ib,en names no"),
        (replace(WIRED, chosen={"NCCL_SOCKET_IFNAME": "=eth"}), "connecting", "NCCL_SOCKET_IFNAME==eth names no"),
        (replace(WIRED, chosen={"NCCL_SOCKET_IFNAME": "eth"}), "summing numbers over nccl", "NCCL_DEBUG=INFO"),
        (replace(WIRED, chosen={"NCCL_SOCKET_IFNAME": "^docker"}), "connecting", "Try GLOO_SOCKET_IFNAME=eth0"),
        (
            replace(WIRED, addresses=("10.9.9.9",)),
            "connecting",
            "box, resolves to 10.9.9.9, which this host does not have",
        ),
        (replace(WIRED, addresses=()), "connecting", "box, resolves to no address"),
        (replace(WIRED, interfaces={"eth0": ("10.0.0.5",)}), "connecting", "ip link set lo up"),
        (WIRED, "connecting", "Try GLOO_SOCKET_IFNAME=eth0"),
    ],
)
def test_the_likely_cause_of_processes_that_do_not_find_one_another(seen: Network, stage: str, cause: str) -> None:
    found = one(network.findings(seen, Collective({}, stage, "timed out\nmore"), 2), "collective")
    assert found.state == State.problem
    assert f"while {stage}: timed out" in found.found
    assert cause in found.advice


def test_a_host_name_that_leads_elsewhere_is_noted() -> None:
    for addresses in ((), ("10.9.9.9",)):
        found = one(network.findings(replace(WIRED, addresses=addresses), Collective({"gloo": 0.1}), 0), "host-name")
        assert found.state == State.note
    assert one(network.findings(WIRED, None, 0), "collective").state == State.note


# Folders


def test_folders_are_tried_by_writing(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    (tmp_path / "file").write_text("x")
    seen = folders.look(deep, tmp_path / "file" / "below", str(tmp_path))
    assert (seen.runs.path, seen.runs.tried, seen.runs.error) == (str(deep), str(tmp_path), "")
    assert seen.stores.error == "Not a directory"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("free", "error", "state"),
    [(60, "", State.ok), (20, "", State.note), (0.5, "", State.problem), (60, "Read-only file system", State.problem)],
)
def test_the_folder_of_the_runs(free: float, error: str, state: State) -> None:
    runs = Folder("/r", "/r", int(free * GIB), 100 * GIB, error)
    assert one(folders.findings(replace(no_gpu().folders, runs=runs), 0), "runs-folder").state == state


def test_shared_memory_matters_between_gpus() -> None:
    small = replace(no_gpu().folders, shared_memory=Folder("/dev/shm", "/dev/shm", 2**26, 2**26))
    assert one(folders.findings(small, 0), "shared-memory").state == State.ok
    found = one(folders.findings(small, 2), "shared-memory")
    assert found.state == State.note
    assert "--shm-size" in found.advice


# Host and environment


def test_limits_memory_and_clock() -> None:
    base = no_gpu().host
    assert one(host.findings(replace(base, files=256), False), "limits").advice.endswith("ulimit -n 65536")
    assert one(host.findings(base, True), "limits").state == State.note
    assert one(host.findings(replace(base, locked=-1), True), "limits").state == State.ok
    assert one(host.findings(replace(base, free=GIB), False), "host").state == State.note
    drifting = one(host.findings(replace(base, synchronised=False), False), "clock")
    assert drifting.state == State.ok
    assert "Training does not depend on it" in drifting.found


def test_the_host_is_what_the_kernel_says() -> None:
    seen = host.look()
    assert seen.files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert 0 < seen.free <= seen.memory
    assert 0 < seen.usable_cores <= seen.cores


def test_variables_that_change_how_training_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen = surroundings.look(offline=True)
    slow = one(surroundings.findings(seen), "variables")
    assert slow.state == State.note
    assert slow.found.startswith("NCCL_P2P_DISABLE=1: GPUs exchange data through the host's memory; ")
    assert "GLOO_SOCKET_IFNAME=eth0 (the interface of gloo)" in slow.found
    assert "hf_secret" not in render(list(surroundings.findings(seen))) + repr(seen)
    left = Surroundings({"RANK": "0", "WORLD_SIZE": "8"})
    found = one(surroundings.findings(left), "variables")
    assert (found.state, found.advice) == (State.problem, "    unset RANK WORLD_SIZE")
    off = Surroundings({"NCCL_P2P_DISABLE": "0"})
    assert one(surroundings.findings(off), "variables").state == State.ok


# Probes


def test_an_import_that_crashes_hangs_or_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(600)")
    (tmp_path / "raising.py").write_text("raise ImportError('undefined symbol: _Z')")
    (tmp_path / "fine.py").write_text("print('a greeting of its own')")

    def tried(name: str, seconds: float = 30.0) -> Probe:
        with probe.importing(name) as child:
            return child.probe(seconds)

    assert tried("crashing") == Probe(error="crashed: the process was ended by SIGSEGV", crashed=True)
    assert tried("hanging", 1.0) == Probe(error="did not end within 1 seconds", crashed=True)
    assert tried("raising") == Probe(error="ImportError: undefined symbol: _Z")
    assert tried("fine").error == ""


def test_no_process_outlives_its_probe(tmp_path: Path) -> None:
    """Those that the command has started itself included."""
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    with probe.running([sys.executable, "-c", code]) as child:
        deadline = time.monotonic() + 30
        while not child.output().strip():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pid = int(child.output())
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("tasks", "on_each", "state"),
    [("2", "1", State.ok), ("8", None, State.note), (None, "4", State.note), (None, "4(x2)", State.ok)],
)
def test_a_job_with_several_tasks_on_a_node(tasks: str | None, on_each: str | None, state: State) -> None:
    given = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": on_each}
    variables = {"SLURM_JOB_ID": "7"} | {name: value for name, value in given.items() if value is not None}
    found = one(surroundings.findings(Surroundings(variables)), "slurm")
    assert found.state == state
    assert ("--ntasks-per-node=1" in found.advice) == (state == State.note)
