"""docs/migration.md, run: the Axolotl file trains after its migration; TRL's scripts and our files beside them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftdist.commands import migrate
from sftdist.core.snapshot import read_yaml
from sftdist.data.template import ChatTemplate
from tests.conftest import ROOT
from tests.e2e.workshop import environment, metrics, sftdist, status, write_rows
from tests.faults import train_to_the_end
from tests.models import tiny_model
from tests.tokenizers import byte_tokenizer

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
SPECIALS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROWS = 48


def blocks(language: str) -> list[str]:
    """The blocks of a language on the page, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


PEERS_FILE, WRITTEN, FULL, LORA = blocks("yaml")
TRL_FULL, TRL_LORA, ROW_FUNCTION = blocks("python")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` and `sft_train.jsonl`; the template writes a BOS, and the tokenizer adds one of its own, as Llama 3's."""
    folder = tmp_path_factory.mktemp("home")
    template = ChatTemplate.of(byte_tokenizer(specials=SPECIALS, prepend_bos=True), "llama3")
    tiny_model("llama", vocab_size=len(template.tokenizer)).save_pretrained(folder / "model")
    template.save(folder / "model")
    write_rows(folder / "sft_train.jsonl", ROWS)
    return folder


def test_the_axolotl_file_of_the_page_trains_after_its_migration(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    Path("my.yml").write_text(PEERS_FILE)
    assert migrate.main(["my.yml"]) == 0
    assert "Unknown" not in capsys.readouterr().out
    written = Path("conf/exp/my.yaml")
    assert written.read_text().partition("\n\n")[2] == WRITTEN, "what the page shows"
    printed = train_to_the_end(1, ["+exp=my", "data.workers=1"], home)
    assert status(home / "out")["state"] == "done", printed
    adapter = json.loads(next((home / "out" / "export").rglob("adapter_config.json")).read_text())
    assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (16, 32, ["q_proj", "v_proj"])
    steps = metrics(home / "out", "step", "loss")
    assert len(steps) == 6, "48 rows in steps of 2 x 8, twice, but for a row that is held out"
    config = read_yaml(home / "out" / "config.yaml")
    assert (config["precision"], config["data"]["max_len"], config["tune"]["method"]) == ("bf16", 4096, "lora")


def trl(script: str, home: Path, *, steps: int = 2) -> dict[str, Any]:
    """TRL's script as the page has it, on a CPU and for a few steps; what it trains on, and its losses."""
    assert script.count("bf16=True,") == script.count("trainer.train()") == 1
    script = script.replace(
        "bf16=True,", f"bf16=True, use_cpu=True, max_steps={steps}, report_to='none', logging_steps=1,"
    )
    look = """
import json
batch = next(iter(trainer.get_train_dataloader()))
tokenizer = trainer.processing_class
first = trainer.train_dataset[0]["input_ids"]
shown = {
    "start": tokenizer.convert_ids_to_tokens(first[:3]),
    "end": tokenizer.convert_ids_to_tokens(first[-2:]),
    "untrained": int(((batch["labels"] == -100) & (batch["attention_mask"] == 1)).sum()),
    "padded": int((batch["attention_mask"] == 0).sum()),
    "rows": len(batch["labels"]),
}
trainer.train()
shown["losses"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print("SHOWN", json.dumps(shown))
"""
    code = script.replace("trainer.train()", look)
    done = run_python(code, home)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.partition("SHOWN")[2])
    return found


def run_python(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=home, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )


def ours(text: str, name: str, home: Path) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    """Our file as the page has it: the tokens of the first row, and step and loss of a whole training."""
    file = home / "conf" / "exp" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    shown = sftdist(["inspect", f"+exp={name}", "limit=1", "output=jsonl", "data.workers=1"], home, timeout=600)
    assert shown.returncode == 0, shown.stderr
    printed = train_to_the_end(
        1, [f"+exp={name}", f"run.dir=runs/{name}", "data.workers=1", "tracking.wandb=disabled"], home
    )
    assert status(home / "runs" / name)["state"] == "done", printed
    return json.loads(shown.stdout.splitlines()[0])["tokens"], metrics(home / "runs" / name, "step", "loss")


@pytest.mark.long
def test_a_full_fine_tune_there_and_here(home: Path) -> None:
    theirs = trl(TRL_FULL, home)
    assert (theirs["rows"], theirs["untrained"]) == (2, 0), "TRL trains every token of the prompts"
    assert theirs["start"] == ["<s>", "<|start_header_id|>", "u"]
    tokens, steps = ours(FULL, "as_trl", home)
    trained = "".join(token["text"] for token in tokens if token["supervised"])
    assert trained == "Thing 0 is red.<|eot_id|>Yes, red.<|eot_id|>"
    assert [token["text"] for token in tokens[:3]] == theirs["start"]
    assert len(steps) == 6, "as many as TRL's: 48 rows in steps of 2 x 8, twice"
    assert steps[0][1] == pytest.approx(theirs["losses"][0], rel=0.05), "one untrained model, other targets"


@pytest.mark.long
def test_lora_over_rendered_text_there_and_here(home: Path) -> None:
    theirs = trl(TRL_LORA, home)
    assert theirs["start"] == ["<s>", "<s>", "<|start_header_id|>"], "the template's BOS, and the tokenizer's"
    assert theirs["end"] == ["<|eot_id|>", "<|eos|>"]
    assert theirs["untrained"] == 0
    tokens, steps = ours(LORA, "as_trl_lora", home)
    assert [token["text"] for token in tokens[:2]] == ["<s>", "<|start_header_id|>"]
    assert tokens[-1]["text"] == "<|eot_id|>"
    assert len(steps) == 6
    adapter = json.loads(next((home / "runs/as_trl_lora/export").rglob("adapter_config.json")).read_text())
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]


@pytest.mark.long
def test_answers_alone_are_refused_there_with_another_template(home: Path) -> None:
    code = TRL_FULL.replace("bf16=True,", "bf16=True, use_cpu=True, assistant_only_loss=True,")
    done = run_python(code, home)
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert "{% generation %}" in done.stderr


def test_the_row_function_of_the_page_takes_text_apart() -> None:
    space: dict[str, Any] = {}
    exec(ROW_FUNCTION, space)
    messages = [{"role": "user", "content": "One\n\ntwo?"}, {"role": "assistant", "content": "Three."}]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    assert space["messages"]({"text": text}) == {"messages": messages}


def test_the_blocks_of_the_page_are_those_that_are_run() -> None:
    assert yaml.safe_load(PEERS_FILE)["lora_target_modules"] == ["q_proj", "v_proj"]
    assert (yaml.safe_load(FULL)["optimizer"]["lr"], "tune" in yaml.safe_load(FULL)) == (2e-5, False)
    assert yaml.safe_load(LORA)["tune"]["target"] == ["q_proj", "v_proj"]
    assert "SFTTrainer" in TRL_FULL
    assert "peft_config" in TRL_LORA
