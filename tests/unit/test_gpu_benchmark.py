"""The GPU benchmark, whole, on a CPU with tiny shapes, and what its parent does with rows that go wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import ROWS, Outcome, Row, chosen_rows, layers_that_fit, main_row, result_of, verdict
from benchmarks.gpu_shapes import FULL, PREPARED, batches, chosen, long_tail, real, shape
from benchmarks.gpu_wheels import command_lines, slim
from benchmarks.gpu_worker import Worker
from tests.conftest import ROOT

# Named by the issue, and what else a plain machine with torch does not have.
BLOCKED = ("datasets", "pyarrow", "wandb", "trl", "hydra", "omegaconf", "jsonschema", "datasketch", "rouge_score")
# What cannot be measured here, and the word by which the row says why.
NOT_HERE = {"Llama-3.1-8B QLoRA": "QLoRA", "Llama-3.1-8B full, offload": "offload"}


def run_tiny(folder: Path, blocked: tuple[str, ...], *words: str) -> tuple[int, dict[str, Any]]:
    """The script with packages that cannot be imported, neither by it nor by its children: exit code and result."""
    (folder / "sitecustomize.py").write_text(f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (file,) = folder.glob("*-gpu-tiny.json")
    return done.returncode, json.loads(file.read_text())


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [float(value)] if isinstance(value, int | float) else []


def test_the_whole_script_runs_without_datasets_pyarrow_wandb_and_trl(tmp_path: Path) -> None:
    code, result = run_tiny(tmp_path, BLOCKED)
    assert code == 0
    figures = result["figures"]
    assert {"trl", "datasets"} <= set(figures["absent"]), "the result says what was not there"
    assert set(figures["rows"]) == {row.name for row in ROWS}
    rate = figures["matmul_flops_per_second"]
    for row in ROWS:
        answer = figures["rows"][row.name]["answer"]
        if row.name in NOT_HERE and "figures" not in answer:
            assert NOT_HERE[row.name] in answer["absent"]
            continue
        found = numbers(answer["figures"])
        assert found, row.name
        assert all(math.isfinite(number) for number in found), row.name
        if row.kind == "train":
            check_training(row, answer["figures"], result["table"], rate)
    kernels = result["more"]["attention kernels"]
    assert {line["backend"] for line in kernels} == {"flash_attn", "torch_varlen", "sdpa"}
    losses = {line["loss"]: line for line in result["more"]["loss kernels"]}
    assert losses["ours, torch"]["differs by"] < 1e-4, "the kernels that are compared compute the same loss"


def check_training(row: Row, figures: dict[str, Any], table: list[dict[str, Any]], rate: float) -> None:
    """tokens/s x FLOPs per token = share of the rate x rate, on both sets of lengths."""
    (line,) = [line for line in table if line["row"] == row.name]
    share = float(str(line["of matmul rate"]).split(" ")[0])
    assert figures["tokens_per_second"] * figures["flops_per_token"] == pytest.approx(share * rate, rel=0.01)
    for one in (figures, figures["long_tail"]):
        assert one["tokens_per_second"] * one["flops_per_token"] == pytest.approx(one["flops_per_second"])
        assert one["tokens_per_second"] * one["step_seconds"] == pytest.approx(one["tokens_per_step"])
    ratio = figures["flops_per_second_as_full"] / figures["flops_per_second"]
    # beside weights this small, adapters of rank 16 cost about what the gradients of the weights would
    assert (ratio == pytest.approx(1.0)) == (row.job["method"] == "full")
    assert 0.9 < ratio < 1.5
    assert line["TRL tokens/s"] in ("trl is not there", "not asked")
    assert len(figures["tried"]) == 5


@pytest.mark.long
def test_without_deepspeed_zero_0_runs_and_the_rest_says_so(tmp_path: Path) -> None:
    code, result = run_tiny(tmp_path, (*BLOCKED, "deepspeed"), "--rows", "Qwen2.5-0.5B full")
    assert code == 0
    assert "deepspeed" in result["figures"]["absent"]
    assert "deepspeed is absent" in result["figures"]["rows"]["Qwen2.5-0.5B full"]["answer"]["figures"]["runs"]


@pytest.mark.long
def test_trl_runs_on_the_same_rows_beside_us(tmp_path: Path) -> None:
    code, result = run_tiny(tmp_path, ("wandb",), "--rows", "Qwen2.5-0.5B full;Llama-3.1-8B LoRA")
    assert code == 0
    for line in result["table"]:
        assert line["TRL tokens/s"] > 0
        assert "aim >= 1.25" in line["times TRL"]


CHILD = """
import json, os, sys, time
for line in sys.stdin:
    do = json.loads(line)["do"]
    if do == "die":
        print("out of luck", file=sys.stderr)
        os._exit(9)
    if do == "hang":
        time.sleep(60)
    print("some library talks")
    told = {"figures": {"pid": os.getpid()}, "left_bytes": 10**12 if do == "leak" else 0}
    print("RESULT " + json.dumps(told | ({"fatal": True} if do == "fatal" else {})), flush=True)
"""


def test_a_row_that_ends_its_process_or_hangs_costs_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_worker.START_SECONDS", 5.0)
    worker = Worker([sys.executable, "-c", CHILD])
    first = worker.ask({"do": "work"}, 5)["figures"]["pid"]
    assert worker.ask({"do": "work"}, 5)["figures"]["pid"] == first, "imports are paid for once"
    assert worker.ask({"do": "die"}, 5) == {"error": "its process ended with 9: out of luck"}
    assert worker.ask({"do": "work"}, 5)["figures"]["pid"] != first
    assert "no answer within" in worker.ask({"do": "hang"}, 0.3)["error"]
    for bad in ("leak", "fatal"):
        before = worker.ask({"do": bad}, 5)["figures"]["pid"]
        assert worker.ask({"do": "work"}, 5)["figures"]["pid"] != before, "what it holds is no row's but its own"
    worker.close()


def outcome(name: str, answer: dict[str, Any], peer: dict[str, Any] | None = None) -> Outcome:
    return Outcome(next(row for row in ROWS if row.name == name), answer, peer or {})


FIGURES = {
    "tokens_per_second": 1000.0,
    "flops_per_second": 60.0,
    "flops_per_second_as_full": 90.0,
    "long_tail": {"tokens_per_second": 900.0},
    "peak_bytes": 2**30,
    "predicted_bytes": 1.2 * 2**30,
    "setting": "s",
    "runs": "r",
}


def test_a_failed_row_stands_in_the_table_and_aims_are_told_beside_their_figures() -> None:
    line = main_row(
        outcome("Llama-3.1-8B LoRA", {"figures": FIGURES}, {"figures": {"tokens_per_second": 900.0}}), 100.0, 200.0
    )
    assert line["of matmul rate"] == "0.6 (aim >= 0.55: reached)"
    assert (line["as if full"], line["of data sheet"]) == (0.9, 0.3)
    assert line["times TRL"] == "1.11 (aim >= 1.25: missed)"
    assert line["off by"] == "0.2 (aim <= 0.1: missed)"
    failed = main_row(outcome("Qwen2.5-1.5B full", {"error": "OutOfMemoryError: too much"}), 100.0, None)
    assert failed["state"] == "FAILED: OutOfMemoryError: too much"
    assert set(failed) == set(line), "one table"
    assert verdict(None, 1.0) == "-"


def test_the_result_holds_every_row_even_where_the_first_failed() -> None:
    outcomes = [outcome("matmul", {"error": "no"}), outcome("Qwen2.5-1.5B full", {"absent": "left out"})]
    result = result_of(outcomes, "python -m benchmarks.gpu", tiny=False)
    assert [line["state"] for line in result.more["every row"]] == ["FAILED: no", "left out"]
    assert "left out" in result.markdown("2026-01-01")


def test_a_name_that_no_row_has_is_refused() -> None:
    assert [row.name for row in chosen_rows("loss")] == ["matmul", "loss"]
    with pytest.raises(ValueError, match="no row is called losses; they are: matmul; "):
        chosen_rows("losses")


def test_8b_in_full_is_cut_where_its_states_do_not_fit_and_says_so() -> None:
    layers, said = layers_that_fit("llama8b", 139 * 2**30)
    assert 12 <= layers < 32
    assert said.startswith(f"{layers} of 32 layers")
    assert layers_that_fit("llama8b", 1000 * 2**30) == (32, "")


def test_packs_are_nearly_full_and_hold_real_and_long_tailed_lengths() -> None:
    mapping = shape("llama8b")
    for rows in (real(PREPARED, FULL), long_tail(FULL)):
        packs = batches(chosen(rows, 4, FULL.pack, mapping), mapping["vocab_size"])
        assert all(0.97 * FULL.pack < len(pack.ids) <= FULL.pack for pack in packs)
        assert all(0.2 < len(pack.index) / len(pack.ids) < 0.8 for pack in packs)
        assert all(len(pack.lengths) > 3 for pack in packs)


def test_the_command_lines_of_the_wheels_name_each_package_once_and_pin_what_was_tried() -> None:
    built, downloaded, smaller = command_lines("FOLDER")
    assert "pip wheel" in built
    assert "-d FOLDER" in downloaded
    assert "--slim FOLDER" in smaller
    for name in ("transformers", "trl", "peft", "bitsandbytes"):
        assert downloaded.count(f" {name}==") == 1


def test_a_slim_wheel_keeps_the_libraries_of_cuda_13_and_a_true_record(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    kept = [
        "bitsandbytes/__init__.py",
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
    ]
    dropped = ["bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_rocm70.so"]
    record = "bitsandbytes-1.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in [*kept, *dropped, record]:
            file.writestr(name, name)
    slim(wheel)
    with zipfile.ZipFile(wheel) as file:
        assert sorted(file.namelist()) == sorted([*kept, record])
        listed = [line.split(",")[0] for line in file.read(record).decode().splitlines()]
    assert listed == [*kept, record]


def test_nothing_is_claimed_of_a_gpu_before_somebody_has_measured_it() -> None:
    """Once a dated file is there, gpu.md goes, and the README may quote it."""
    results = ROOT / "benchmarks" / "results"
    if list(results.glob("20*-gpu.json")):
        assert not (results / "gpu.md").exists(), "it says that nothing was measured"
        return
    assert "not measured yet" in (results / "gpu.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for word in ("H200", "H100", "A100", "MFU of", "results/gpu"):
        assert word not in readme, f"{word}: no figure of a GPU was measured"
