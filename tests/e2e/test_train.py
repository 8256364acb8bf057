"""The whole program, as a user starts it: tiny model, tiny data, real processes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftdist.core.config import compose
from sftdist.core.errors import ConfigError, DataError, TrainingError
from sftdist.train import run
from tests.e2e.workshop import SMALL, environment, evaluations, metrics, model_folder, rows, sftdist, status, write_rows

EXACT = ("step", "loss", "grad_norm", "lr", "rows")


@pytest.fixture
def inside(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def own(preset: str, *more: str) -> list[str]:
    return [f"+exp={preset}", "model.path=model", "data.train=my.jsonl", *SMALL, *more]


def in_process(preset: str, *more: str) -> Any:
    return run(compose(preset, own(preset, *more)[1:]))


def test_a_users_own_model_and_data_from_start_to_export(home: Path) -> None:
    command = ["train", *own("full", "train.epochs=1", "launch.nproc=2", "zero.stage=1", "run.dir=runs/own")]
    done = sftdist(command, home)
    assert done.returncode == 0, done.stderr
    run_dir = home / "runs/own"
    assert status(run_dir)["state"] == "done"
    assert done.stdout.count("check ") == 10
    export = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    stops = export.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(home / "model").chat_template
    losses = [loss for (loss,) in metrics(run_dir, "loss")]
    assert losses[-1] < losses[0]
    ids = [json.loads(line)["rows"] for line in (run_dir / "log/rows.jsonl").read_text().splitlines()]
    trained = [row for step in ids for row in step]
    assert len(trained) == len(set(trained)), "one epoch sees every conversation once"
    again = sftdist(command, home)
    assert again.returncode == 0
    assert "is finished" in again.stdout


def test_a_preempted_run_ends_with_75_and_goes_on_bit_equal(home: Path) -> None:
    """X4 through the whole program: TERM to the agent, then the same command line again."""
    keys = ["train.epochs=6", "launch.nproc=2", "zero.stage=2", "precision=fp32", "eval.every_steps=3"]
    whole = sftdist(["train", *own("full", *keys, "run.dir=runs/whole")], home)
    assert whole.returncode == 0, whole.stderr
    command = ["train", *own("full", *keys, "run.dir=runs/cut")]
    process = subprocess.Popen(
        [sys.executable, "-m", "sftdist.cli", *command],
        cwd=home,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    figures = home / "runs/cut/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (figures.is_file() and figures.read_text().count('"train"') >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    stopped = status(home / "runs/cut")
    assert stopped["state"] == "preempted"
    assert 2 <= stopped["step"] < len(metrics(home / "runs/whole", "step"))
    again = sftdist(command, home)
    assert again.returncode == 0, again.stderr
    assert metrics(home / "runs/cut", *EXACT) == metrics(home / "runs/whole", *EXACT)
    assert evaluations(home / "runs/cut") == evaluations(home / "runs/whole") != []


@pytest.mark.parametrize("preset", [pytest.param("llama8b", marks=pytest.mark.long), "llama8b_lora"])
def test_the_8b_presets_train_with_a_tiny_shape(home: Path, preset: str) -> None:
    """The very same configuration; only the sizes of the model and of the packs are small."""
    tiny = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=4"]
    shape = [f"model.shape.{word}" for word in (*tiny, "num_key_value_heads=2", "head_dim=8", "vocab_size=300")]
    sources = [f"data.sources.{name}.path={home / 'my.jsonl'}" for name in ("domain", "general", "format")]
    command = [
        "train",
        f"+exp={preset}",
        *shape,
        *sources,
        "data.dir=null",
        "model.init=random",
        "model.path=null",
        "model.tokenizer=model",
        "model.chat_template=chatml",
        "train.max_steps=3",
        "data.max_len=256",
        "train.pack_tokens=512",
        "train.packs_per_step=4",
        "launch.nproc=2",
        "tracking.wandb=disabled",
        f"run.dir=runs/{preset}",
    ]
    done = sftdist(command, home)
    assert done.returncode == 0, done.stderr
    assert [step for (step,) in metrics(home / "runs" / preset, "step")] == [1, 2, 3]
    assert all(math.isfinite(loss) for (loss,) in metrics(home / "runs" / preset, "loss"))


def test_rows_in_memory_from_python(inside: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inside / "model")
    for kind, data in (("list", rows(60)), ("table", Dataset.from_list(rows(60)))):
        cfg = compose("lora", ["model.path=model", *SMALL, "train.max_steps=2", f"run.dir=runs/{kind}"])
        result = run(cfg, dataset=data, tokenizer=tokenizer)
        assert (result.state, result.step) == ("done", 2)
        assert result.export is not None
    one, other = (metrics(inside / "runs" / kind, "loss", "rows") for kind in ("list", "table"))
    assert one == other


@pytest.mark.long  # tests/dist shows the same of the whole contract on two ranks
def test_the_checks_leave_no_trace(inside: Path) -> None:
    for stage in (0, 1):  # every stage and precision on two ranks: tests/dist
        keys = ("train.max_steps=3", "precision=fp32", f"zero.stage={stage}", "tune.dropout=0.1")
        in_process("lora", *keys, f"run.dir=runs/with{stage}")
        in_process("lora", *keys, "train.startup_checks=false", f"run.dir=runs/without{stage}")
        with_checks, without = (inside / f"runs/{name}{stage}" for name in ("with", "without"))
        assert metrics(with_checks, "loss", "grad_norm") == metrics(without, "loss", "grad_norm")


def test_unpacked_training(inside: Path) -> None:
    result = in_process("full", "train.packing=false", "train.max_steps=3", "run.dir=runs/unpacked")
    assert result.step == 3
    assert all(conversations == 4 for (conversations,) in metrics(inside / "runs/unpacked", "conversations"))


def test_a_poisoned_weight_stops_before_the_first_update(home: Path, inside: Path) -> None:
    """S13: a non-finite loss ends the run, names the rows, and nothing is exported."""
    poisoned = model_folder(home / "poisoned")
    weights = load_file(poisoned / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    keys = ["model.path=poisoned", "train.startup_checks=false", "train.max_steps=3", "run.dir=runs/poisoned"]
    with pytest.raises(TrainingError, match=r"must be finite.*train/row-"):
        in_process("full", *keys)
    assert status(home / "runs/poisoned")["state"] == "failed"
    assert not (home / "runs/poisoned/export").exists()
    assert not list((home / "runs/poisoned").glob("checkpoints/step-*"))
    tried = json.loads((home / "runs/poisoned/log/rows.jsonl").read_text())
    assert tried["step"] == 1
    assert all(row.startswith("train/row-") for row in tried["rows"])


def test_another_configuration_in_the_same_run_directory_is_refused(inside: Path) -> None:
    in_process("full", "train.max_steps=1", "run.dir=runs/owned")
    with pytest.raises(ConfigError, match=r"optimizer\.lr: was 0\.001, now 0\.5"):
        in_process("full", "train.max_steps=1", "run.dir=runs/owned", "optimizer.lr=0.5")


def test_other_rows_under_the_same_configuration_are_refused(inside: Path) -> None:
    """Rows in memory are no part of the configuration: without a check the second call would return the first model."""
    cfg = compose("full", ["model.path=model", *SMALL, "train.max_steps=1", "run.dir=runs/rows"])
    run(cfg, dataset=rows(40))
    assert run(cfg, dataset=rows(40)).state == "done"
    with pytest.raises(ConfigError, match=r"was begun with other data or another tokenizer \(source train\)"):
        run(cfg, dataset=rows(41))


def test_one_validation_file_for_several_sources(home: Path, inside: Path) -> None:
    write_rows(home / "val.jsonl", 130)
    (home / "val.jsonl").write_text("".join((home / "val.jsonl").read_text().splitlines(keepends=True)[121:]))
    sources = [f"+data.sources.{name}.path=my.jsonl" for name in ("one", "other", "third")]
    keys = ["model.path=model", *sources, "data.val=val.jsonl", *SMALL, "train.max_steps=2", "run.dir=runs/val"]
    cfg = compose("full", [*keys, "eval.every_steps=1"])
    run(cfg)
    lines = evaluations(inside / "runs/val")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["eval/loss"] == line["eval/loss/validation"] for line in lines)


def test_a_large_source_without_a_store_names_the_prepare_command(
    home: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1: no rank waits while another tokenises; the job says at once what to run."""
    with (home / "large.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"q{n}", "completion": "a"}) + "\n" for n in range(50_001))
    argv = ["train", "+exp=full", "model.path=model", "data.train=large.jsonl"]
    monkeypatch.setattr(sys, "argv", argv)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"sftdist prepare \+exp=full model\.path=model data\.train=large\.jsonl"):
        run(compose("full", [*argv[2:], *SMALL, "train.max_steps=1", "run.dir=runs/large"]))
    assert time.monotonic() - started < 20


def test_a_base_model_learns_to_stop(home: Path, inside: Path) -> None:
    """S10 and S11: the end-of-turn row is untrained (all zero); after LoRA the greedy answer ends with it."""
    base = model_folder(home / "base", hidden_size=64, intermediate_size=128)
    weights = load_file(base / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(base)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name][stop] = 0.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    one = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    keys = [*SMALL, "model.path=base", "data.deduplicate=false", "train.max_steps=60", "optimizer.lr=2e-2"]
    fractions = ["data.val_fraction=0", "data.holdout_fraction=0", "data.max_passes=null", "train.epochs=null"]
    result = run(compose("lora", [*keys, *fractions, "precision=fp32", "run.dir=runs/base"]), dataset=one * 40)
    assert result.export is not None
    model = AutoModelForCausalLM.from_pretrained(result.export, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(one[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"] if not isinstance(prompt, torch.Tensor) else prompt
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert tokenizer.decode(answer) == "yes<|im_end|>"
