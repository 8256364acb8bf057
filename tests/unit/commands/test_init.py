"""`sftdist init`: what it writes composes, fits the data, and says why; nothing that is there is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sftdist.commands.init import main
from sftdist.core.config import compose
from sftdist.core.settings import EvaluateConfig, Method
from tests.e2e.workshop import model_folder

Rows = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("init") / "model")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


TEXT = [chat(f"question {n} {'x' * (n % 7)}", f"an answer to question {n}") for n in range(400)]
JSON = [chat(f"ticket {n}", json.dumps({"number": n, "urgent": n % 2 == 0})) for n in range(400)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def init(model: Path, data: Path, *words: str, name: str = "mine") -> int:
    return main([name, "--model", str(model), "--data", str(data), *words])


def test_what_it_writes_composes_and_has_a_reason_for_each_value(model: Path, folder: Path) -> None:
    assert init(model, written(folder / "my.jsonl", TEXT)) == 0
    cfg = compose("mine", complete=True)
    assert cfg.tune.method is Method.full  # a model of some thousand parameters fits anywhere
    assert compose("mine", ["run.dir=runs/x"], EvaluateConfig, complete=True).gate.rules
    lines = (folder / "conf/exp/mine.yaml").read_text().splitlines()
    for key in ("max_len:", "method:", "lr:", "epochs:", "warmup_ratio:", "pack_tokens:"):
        at = next(number for number, line in enumerate(lines) if line.strip().startswith(key))
        above = lines[at - 1].strip()
        assert above.startswith("#") or above.endswith("model") or ":" in above, f"{key} has no reason: {above}"


def test_max_len_is_that_of_nearly_all_rows(model: Path, folder: Path) -> None:
    init(model, written(folder / "short.jsonl", TEXT), name="short")
    init(
        model,
        written(folder / "long.jsonl", [*TEXT[:300], *(chat("q", "word " * 30) for _ in range(100))]),
        name="long",
    )
    short, long = compose("short").data.max_len, compose("long").data.max_len
    assert 40 <= short < 160 < long, "a byte is a token here: some 40 in the short rows, 150 and more in the long ones"


def test_json_answers_get_a_contract_and_its_rules(model: Path, folder: Path) -> None:
    assert init(model, written(folder / "tickets.jsonl", JSON)) == 0
    contract = yaml.safe_load((folder / "conf/contract/mine.yaml").read_text())
    assert "urgent" in json.dumps(contract)
    gate = (folder / "conf/gate/mine.yaml").read_text()
    assert "contract_kept" in gate
    assert "contract_kept" not in _gate_of(model, folder, TEXT)


def _gate_of(model: Path, folder: Path, rows: list[dict[str, Any]]) -> str:
    init(model, written(folder / "text.jsonl", rows), name="text")
    return (folder / "conf/gate/text.yaml").read_text()


def test_little_memory_asks_for_adapters(model: Path, folder: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    big = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    shutil.copytree(model, folder / "big")
    (folder / "big/config.json").write_text(json.dumps({**config, **big, "num_key_value_heads": 8, "head_dim": 128}))
    data = written(folder / "my.jsonl", TEXT)
    methods = []
    for gpus, memory in (("8", "80"), ("1", "40"), ("1", "12")):
        words = ("--gpus", gpus, "--gpu", "h100", "--memory-gib", memory, "--force")
        assert init(folder / "big", data, *words) == 0
        methods.append(compose("mine").tune.method.value)
    assert methods == ["full", "lora", "qlora"]


@pytest.mark.parametrize(("flags", "precision"), [({"avx512_bf16": True}, "bf16"), ({"avx2": True}, "fp32")])
def test_a_cpu_trains_in_what_it_computes(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert init(model, written(folder / "my.jsonl", TEXT)) == 0
    assert compose("mine").precision == precision
    assert init(model, written(folder / "my.jsonl", TEXT), "--gpu", "h100", name="gpu") == 0
    assert compose("gpu").precision == "bf16"


def test_nothing_that_is_there_is_replaced(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(folder / "my.jsonl", TEXT)
    init(model, data)
    mine = folder / "conf/exp/mine.yaml"
    mine.write_text("my own words\n")
    assert init(model, data) == 2
    assert "conf/exp/mine.yaml" in capsys.readouterr().err
    assert mine.read_text() == "my own words\n"
    assert init(model, data, "--force") == 0
    assert mine.read_text() != "my own words\n"


@pytest.mark.parametrize(
    ("name", "data", "code", "said"),
    [
        ("a b", "my.jsonl", 2, "required letters, digits"),
        ("quickstart", "my.jsonl", 2, "which sftdist has itself"),
        ("mine", "absent.jsonl", 3, "does not exist"),
    ],
)
def test_wrong_words_are_told(
    model: Path, folder: Path, name: str, data: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written(folder / "my.jsonl", TEXT)
    assert init(model, folder / data, name=name) == code
    assert said in capsys.readouterr().err
    assert not (folder / "conf").exists()


def test_a_folder_that_is_no_model_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    assert init(folder / "empty", written(folder / "my.jsonl", TEXT)) == 2
    assert "empty" in capsys.readouterr().err


def test_rows_that_cannot_be_trained_are_named(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(model, written(folder / "my.jsonl", [*TEXT, {"messages": 5}])) != 0
    assert "BEFORE IT RUNS: 1 of 401 rows" in capsys.readouterr().out


def test_the_job_is_sound_shell(model: Path, folder: Path) -> None:
    init(model, written(folder / "my.jsonl", TEXT))
    job = folder / "slurm/mine.sbatch"
    assert subprocess.run(["bash", "-n", job], check=False).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", job], check=False).returncode == 0
    assert "run_job pipeline +exp=mine name=mine" in job.read_text()
