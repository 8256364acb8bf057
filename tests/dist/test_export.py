"""Exports that can be trusted: A3, A4, A12, A16, S10, S11, S19, X8, at every ZeRO stage on two ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.storage import write_manifest
from sftdist.data.message import Message
from sftdist.data.template import ChatTemplate
from sftdist.data.vocabulary import train_tokenizer
from sftdist.model.lora import LoraSpec
from sftdist.training.export import ADAPTER, ExportSpec, export_model
from sftdist.training.export_check import problems_of
from sftdist.training.export_proof import verify_export
from sftdist.training.shards import INDEX
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, Case, make_engine, packs_of, train_step

WORDS: dict[str, Any] = {"vocab_size": 320}
SHARDS = 16 * 2**10  # several shards, also of a tiny model
IDS = torch.arange(3, 60, 2)


def case(stage: int, precision: str = "fp32", family: str = "llama", **more: Any) -> Case:
    return Case(stage, precision, family, ADAMW, changes=WORDS, **more)


CASES = {
    "zero0-tied": case(0, family="llama_tied"),
    "zero1-untied-bf16": case(1, "bf16"),
    "zero3-tied-bf16": case(3, "bf16", "llama_tied"),
    "zero2-lora-rows-tied": case(2, family="llama_tied", lora=LoraSpec(r=4, alpha=8.0), rows=(5, 6)),
    "zero3-lora": case(3, lora=LoraSpec(r=4, alpha=8.0, rslora=True)),
}
LONG_CASES = {
    "zero3-untied": case(3),
    "zero2-tied-bf16": case(2, "bf16", "llama_tied"),
    "zero1-dora": case(1, lora=LoraSpec(r=4, alpha=8.0, dora=True)),
    "zero1-lora-rows": case(1, lora=LoraSpec(r=4, alpha=8.0), rows=(5, 6)),
    "zero3-lora-tied-bf16": case(3, "bf16", "llama_tied", lora=LoraSpec(r=4, alpha=8.0)),
    "zero3-experts": case(3, family="mixtral"),
    "zero2-experts-lora": case(2, family="mixtral", lora=LoraSpec(r=4, alpha=8.0)),
    "zero2-gemma2": case(2, family="gemma2"),
}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def make_template() -> ChatTemplate:
    return ChatTemplate.of(train_tokenizer(["some words, and some more words"] * 20, 300), "chatml")


@dataclass(frozen=True)
class Exported:
    folder: Path
    logits: np.ndarray[Any, Any]  # of the live model, for IDS
    base_logits: np.ndarray[Any, Any]  # before training


def export_all(world: World, folder: str, cases: dict[str, Case]) -> dict[str, Exported]:
    exported = {}
    for name, todo in cases.items():
        engine = make_engine(todo, world)
        before = engine.logits(IDS)
        for step in range(2):
            train_step(engine, world, packs_of(step), 1e-2)
        spec = ExportSpec(dtype=todo.precision, shard_bytes=SHARDS)
        path = export_model(engine, make_template(), Path(folder) / name, spec)
        assert path is not None
        exported[name] = Exported(path, engine.logits(IDS).cpu().numpy(), before.cpu().numpy())
        engine.close()
    return exported


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = str(tmp_path_factory.mktemp("exports"))
    exported: dict[str, Exported] = run_ranks(export_all, 2, folder, CASES, timeout=280)[0]
    return exported


def loaded_logits(folder: Path) -> np.ndarray[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        return np.asarray(model(input_ids=IDS[None]).logits[0].float().numpy())


def error_of(logits: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", list(CASES))
def test_loaded_export_gives_the_live_logits(exports: dict[str, Exported], name: str) -> None:
    """X8; and the untrained model is told from the trained one by the same measure."""
    done, tolerance = exports[name], TOLERANCE[CASES[name].precision]
    assert error_of(loaded_logits(done.folder), done.logits) < tolerance
    assert error_of(done.base_logits, done.logits) > tolerance


@pytest.mark.parametrize("name", list(CASES))
def test_files_of_an_export(exports: dict[str, Exported], name: str) -> None:
    """Shards with an index over all tensors, tied ones once, tokenizer, template, stop ids, manifest."""
    folder, tied = exports[name].folder, "-tied" in name
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert ("lm_head.weight" not in index) == tied
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
    assert problems_of(folder) == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(generation["eos_token_id"]) == stops
    messages = [Message(role="user", content="some words")]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "some words"}], add_generation_prompt=True, return_dict=False
    )
    assert ids == list(make_template().encode_prompt(messages))


@pytest.mark.parametrize("name", ["zero2-lora-rows-tied", "zero3-lora"])
def test_adapter_loads_onto_the_base(exports: dict[str, Exported], name: str) -> None:
    """A4: the adapter folder, read by PEFT alone, gives the live logits on the untouched base."""
    adapter = exports[name].folder / ADAPTER
    base = tiny_model(CASES[name].family, **WORDS)
    base.set_attn_implementation("eager")
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        logits = model(input_ids=IDS[None]).logits[0].numpy()
    assert error_of(logits, exports[name].logits) < 1e-4
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        assert all(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


def test_wrong_exports_are_refused(exports: dict[str, Exported], tmp_path: Path) -> None:
    """A truncated and an altered shard by file name; then, with a manifest that agrees, a missing and a NaN tensor."""
    source = exports["zero0-tied"].folder
    shard = sorted(source.glob("model-*.safetensors"))[1].name

    def copied(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    truncated = copied("truncated")
    (truncated / shard).write_bytes((source / shard).read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=shard):
        verify_export(truncated)

    altered = copied("altered")
    content = bytearray((source / shard).read_bytes())
    content[-1] ^= 1
    (altered / shard).write_bytes(content)
    with pytest.raises(CheckpointError, match=shard):
        verify_export(altered)

    poisoned = copied("poisoned")
    tensors = load_file(source / shard)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, poisoned / shard, metadata={"format": "pt"})
    write_manifest(poisoned)
    with pytest.raises(CheckpointError, match="not finite"):
        verify_export(poisoned)

    missing = copied("missing")
    tensors = load_file(source / shard)
    index = json.loads((source / INDEX).read_text())
    dropped = next(iter(tensors))
    del tensors[dropped], index["weight_map"][dropped]
    save_file(tensors, missing / shard, metadata={"format": "pt"})
    (missing / INDEX).write_text(json.dumps(index))
    write_manifest(missing)
    with pytest.raises(CheckpointError, match="missing keys"):
        verify_export(missing)


def export_of_another_model(world: World, folder: str) -> tuple[str, list[str]]:
    """Train on after the probe's logits were taken: what is written is then not what was proven."""
    engine = make_engine(case(2), world)
    train_step(engine, world, packs_of(0), 1e-2)
    earlier = engine.logits
    stale = [earlier(torch.arange(24)) + 1.0 for _ in range(3)]
    engine.logits = lambda ids: stale.pop()  # type: ignore[method-assign]
    message = ""
    try:
        export_model(engine, make_template(), Path(folder) / "export", ExportSpec(dtype="fp32"))
    except CheckpointError as error:
        message = str(error)
    return message, [path.name for path in Path(folder).iterdir()]


def test_an_export_that_is_not_the_live_model_never_gets_its_name(tmp_path: Path) -> None:
    for message, left in run_ranks(export_of_another_model, 2, str(tmp_path)):
        assert "logits differ" in message
        assert left == []


def dora_partitioned(world: World) -> str:
    try:
        make_engine(case(3, lora=LoraSpec(dora=True)), world)
    except ConfigError as error:
        return str(error)
    return ""


def test_dora_under_zero_3_is_refused() -> None:
    """PEFT's DoRA reads adapter weights that ZeRO 3 has left empty."""
    assert "tune.dora" in run_ranks(dora_partitioned, 1)[0]


@pytest.mark.long
def test_further_exports(tmp_path: Path) -> None:
    for name, done in run_ranks(export_all, 2, str(tmp_path), LONG_CASES, timeout=290)[0].items():
        tolerance = TOLERANCE[LONG_CASES[name].precision]
        assert error_of(loaded_logits(done.folder), done.logits) < tolerance, name
        assert error_of(done.base_logits, done.logits) > tolerance, name
