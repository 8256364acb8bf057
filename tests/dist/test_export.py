"""Exports that can be trusted: A3, A4, A12, A16, S10, S11, S19, X8, at every ZeRO stage on two ranks."""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.storage import write_manifest
from sftdist.data.message import Message
from sftdist.data.template import ChatTemplate
from sftdist.data.vocabulary import train_tokenizer
from sftdist.model.lora import LoraSpec
from sftdist.training import export
from sftdist.training.export import ADAPTER, ExportSpec, export_model
from sftdist.training.export_check import problems_of
from sftdist.training.export_proof import FreshCheck, verify_export
from sftdist.training.optimizer import lr_at
from sftdist.training.shards import INDEX
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, SGD, Case, make_engine, packs_of, train_step

WORDS: dict[str, Any] = {"vocab_size": 320}
SHARDS = 16 * 2**10  # several shards, also of a tiny model
IDS = torch.arange(3, 60, 2)


def case(stage: int, precision: str = "fp32", family: str = "llama", **more: Any) -> Case:
    return Case(stage, precision, family, ADAMW, changes=WORDS, **more)


LORA = LoraSpec(r=4, alpha=8.0)
CASES = {
    "zero0-tied": case(0, family="llama_tied"),
    "zero1-untied-bf16": case(1, "bf16"),
    "zero3-tied-bf16": case(3, "bf16", "llama_tied"),
    "zero2-lora-rows-tied": case(2, family="llama_tied", lora=LORA, rows=(5, 6)),
    "zero3-lora": case(3, lora=LoraSpec(r=4, alpha=8.0, rslora=True)),
}
FURTHER_CASES = {
    "zero1-dora": case(1, lora=LoraSpec(r=4, alpha=8.0, dora=True)),
    "zero1-lora-rows": case(1, lora=LORA, rows=(5, 6)),
    "zero2-qlora-rows-bf16": case(2, "bf16", lora=LORA, rows=(5, 6), double_quant=True),
    "zero3-qlora": case(3, lora=LORA, double_quant=False),
    "zero3-lora-tied-bf16": case(3, "bf16", "llama_tied", lora=LORA),
    "zero3-experts": case(3, family="mixtral"),
    "zero2-experts-lora": case(2, family="mixtral", lora=LORA),
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


def matrix(stage: int) -> dict[str, Case]:
    """Every kind of export at one ZeRO stage; the LoRA runs are exported merged and as an adapter alone."""
    families = {"tied": "llama_tied", "untied": "llama"}
    full = {f"zero{stage}-{tie}": case(stage, family=family) for tie, family in families.items()}
    return full | {f"zero{stage}-lora-{tie}": case(stage, family=family, lora=LORA) for tie, family in families.items()}


def export_all(world: World, folder: str, cases: dict[str, Case], alone: bool = False) -> dict[str, Exported]:
    """Train two steps and export; with `alone`, a LoRA run's adapter by itself, too, beside its base on disk."""
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
        if alone and todo.lora is not None:
            base = Path(folder) / f"{name}-base"
            if world.is_main:
                tiny_model(todo.family, **WORDS).save_pretrained(base)
            adapted: Any = engine.module.model
            adapted.peft_config["default"].base_model_name_or_path = str(base)
            adapter = export_model(engine, make_template(), Path(folder) / f"{name}-alone", ExportSpec(merge=False))
            assert adapter is not None
            exported[f"{name}-alone"] = replace(exported[name], folder=adapter)
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
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_kind_of_export(tmp_path: Path, stage: int) -> None:
    """Full, merged and adapter, tied and untied: shapes as in the config, finite, and the live logits."""
    exported = run_ranks(export_all, 2, str(tmp_path), matrix(stage), True, timeout=290)[0]
    assert len(exported) == 6
    for name, done in exported.items():
        assert problems_of(done.folder) == [], name
        adapter = done.folder if name.endswith("-alone") else done.folder / ADAPTER
        if "lora" in name:
            base = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name.removesuffix('-alone')}-base")
            with torch.no_grad():
                logits = PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=IDS[None]).logits[0].numpy()
            assert error_of(logits, done.logits) < 1e-4, name
        if not name.endswith("-alone"):
            assert error_of(loaded_logits(done.folder), done.logits) < 1e-4, name
            assert stored_shapes(done.folder) == shapes_of_config(done.folder), name
        assert error_of(done.base_logits, done.logits) > 1e-4, name


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape) for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def shapes_of_config(folder: Path) -> dict[str, tuple[int, ...]]:
    """What a model of this config has, a tied head once, from the config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.long
def test_further_exports(tmp_path: Path) -> None:
    for name, done in run_ranks(export_all, 2, str(tmp_path), FURTHER_CASES, timeout=290)[0].items():
        tolerance = TOLERANCE[FURTHER_CASES[name].precision]
        assert error_of(loaded_logits(done.folder), done.logits) < tolerance, name
        assert error_of(done.base_logits, done.logits) > tolerance, name


def export_when_asked_to_stop(world: World, folder: str) -> list[tuple[str, float, bool]]:
    """Rank 1 alone is asked: at the third tensor, then while the fresh process runs."""
    engine = make_engine(case(2, lora=LORA), world)
    train_step(engine, world, packs_of(0), 1e-2)
    phases: list[str] = []

    def at_the_third_tensor() -> bool:
        phases.append(world.progress.now.phase)
        return world.rank == 1 and phases.count("exporting") == 3

    def in_the_check() -> bool:
        return world.rank == 1 and world.progress.now.phase == "checking the export"

    ends = []
    for stopped in (at_the_third_tensor, in_the_check):
        began = time.monotonic()
        path = export_model(engine, make_template(), Path(folder) / "export", stopped=stopped)
        left = [*Path(folder).iterdir(), *psutil.Process().children()]
        ends.append((str(path), time.monotonic() - began, bool(left)))
    return ends


def test_an_export_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    """No folder, no process, soon, and on every rank, whichever was asked."""
    for ends in run_ranks(export_when_asked_to_stop, 2, str(tmp_path)):
        assert [(path, left) for path, _, left in ends] == [("None", False)] * 2
        assert all(seconds < 10.0 for _, seconds, _ in ends)


def export_without_learning(world: World, folder: str) -> list[str]:
    """Adapters as they began: before any update, which is no fault, then after one at rate 0, which is."""
    export._Job.prove = lambda self, folder: None  # type: ignore[method-assign]
    engine = make_engine(case(2, lora=LORA), world)
    said = [str(export_model(engine, make_template(), Path(folder) / "fresh"))]
    train_step(engine, world, packs_of(0), 0.0)
    for spec in (ExportSpec(), ExportSpec(merge=False)):
        try:
            said.append(str(export_model(engine, make_template(), Path(folder) / "idle", spec)))
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_an_adapter_that_learned_nothing_is_refused_after_an_update(tmp_path: Path) -> None:
    """A4. And no first update of a run has the rate 0, so that no run ends there by mistake."""
    for fresh, *idle in run_ranks(export_without_learning, 2, str(tmp_path)):
        assert fresh == str(tmp_path / "fresh")
        assert len(idle) == 2
        assert all("every lora_B of the adapter is zero" in text for text in idle)
    assert not (tmp_path / "idle").exists()
    for total, schedule in itertools.product(range(1, 5), ["cosine", "linear", "constant"]):
        for warmup in range(total + 1):
            assert lr_at(0, lr=1.0, total=total, warmup=warmup, schedule=schedule, min_ratio=0.0) > 0.0


MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE: dict[str, Any] = {
    **{"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6},
    **{"num_attention_heads": 8, "num_key_value_heads": 8},
}


def peak_growth(work: Callable[[], Any]) -> float:
    """By how many MiB `work` raises this process's resident memory at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = resident("VmHWM")
    work()
    return resident("VmHWM") - before


def resident(kind: str) -> float:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def memory_of_an_export(world: World, folder: str, stage: int, lora: LoraSpec | None) -> tuple[float, float]:
    """The growth in MiB of one that streams, and of one that collects every tensor first."""
    # Large blocks go back to the kernel when they are freed; else glibc keeps some for later, which is no growth.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)
    engine = make_engine(Case(stage, "fp32", "llama", SGD, changes=LARGE, lora=lora), world)
    job = export._Job(engine, make_template(), ExportSpec("fp32", shard_bytes=8 * MIB), None, print, FreshCheck())
    streamed = peak_growth(partial(job._write_shards, Path(folder)))
    assert not world.is_main or len(list(Path(folder).glob("*.safetensors"))) > 20
    honest = export._tensors
    export._tensors = lambda *arguments: iter(list(honest(*arguments)))
    return streamed, peak_growth(partial(job._write_shards, Path(folder)))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("stage", "lora"),
    [(3, LORA), *(pytest.param(*case, marks=LONG) for case in [(3, None), (2, None), (2, LORA), (0, None), (0, LORA)])],
)
def test_memory_is_one_shard_and_one_layer_on_every_rank(tmp_path: Path, stage: int, lora: LoraSpec | None) -> None:
    """A12. The peak of resident memory: 310 MiB of weights, a shard of 8 MiB, a layer of 48 MiB."""
    for rank, (streamed, collected) in enumerate(run_ranks(memory_of_an_export, 2, str(tmp_path), stage, lora)):
        assert streamed < 8 + 48 + 16, rank
        if stage or lora is not None:  # stage 0 has every weight in memory anyhow
            assert collected > 280, rank
