"""A12, A17: any checkpoint of a run becomes a proven model on one CPU process, bit-equal to the live export."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sftdist import train
from sftdist.commands.export import run
from sftdist.core.config import compose
from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.settings import ExportConfig
from sftdist.training import export
from sftdist.training.checkpoint import Checkpoints
from tests.e2e.workshop import SMALL, model_folder, write_rows
from tests.faults import contents, no_fault, train_to_the_end

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 4.0}
WHOLE = ("zero.deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}",)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "llama_tied"):
        model_folder(folder / family, family)
    write_rows(folder / "my.jsonl")
    return folder


def words(method: str, family: str, stage: int, name: str, *more: str) -> list[str]:
    data = ("data.train=my.jsonl", "data.val_fraction=0.1", *SMALL)
    own = (f"+exp={method}", f"model.path={family}", f"zero.stage={stage}", *(WHOLE if stage == 3 else ()))
    return [*own, *data, "precision=fp32", "export.dtype=fp32", "train.max_steps=2", f"run.dir={name}", *more]


def offline(run_dir: Path, *more: str) -> Path:
    return run(compose(overrides=[f"run.dir={run_dir}", *more], schema=ExportConfig))


def unproven(rank: int, pipe: Connection) -> None:
    """The export of the training program is not loaded again: another test does that."""
    export._Job.prove = lambda self, folder: None  # type: ignore[method-assign]


def best_is_second(rank: int, pipe: Connection) -> None:
    """Evaluation losses that say so, and the live weights of step 2 in a file."""
    unproven(rank, pipe)
    evaluate, save = train.evaluate_loss, Checkpoints.save
    losses = iter(LOSSES.values())

    def evaluated(*arguments: Any, **named: Any) -> dict[str, float]:
        figures = evaluate(*arguments, **named)
        return {**(figures or {}), "eval/loss": next(losses)}

    def saved(self: Checkpoints, engine: Any, state: Mapping[str, Any], step: int) -> Path:
        if step == 2:
            weights = {name: value.detach().clone() for name, value in engine.parameters()}
            if rank == 0:
                save_file(weights, "second.safetensors")
        return save(self, engine, state, step)

    train.evaluate_loss = evaluated
    Checkpoints.save = saved  # type: ignore[method-assign]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_best_checkpoint_is_kept_and_exported_bit_equal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A17: best at step 2 of 5, one kept beside it; what is exported are the weights the engine had after step 2."""
    monkeypatch.chdir(place)
    often = ("train.max_steps=5", "checkpoint.every_steps=1", "eval.every_steps=1")
    keep = ("checkpoint.keep_last=1", "checkpoint.keep_best=true")
    train_to_the_end(2, words("full", "llama_tied", 3, "best", *often, *keep), place, best_is_second)
    steps = sorted(path.name for path in (place / "best/checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000005"]

    folder = offline(place / "best", "step=best")

    assert folder == place / "best/export-step-00000002"
    wanted, found = load_file(place / "second.safetensors"), tensors_in(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    monkeypatch.setattr(export._Job, "prove", lambda self, folder: None)
    assert contents(offline(place / "best")) == contents(place / "best/export")
    assert not torch.equal(*(tensors_in(path)["model.norm.weight"] for path in (folder, place / "best/export")))


def test_a_lora_checkpoint_offline_is_the_live_export(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged and adapter, in bf16 from a base in fp32, file by file; then what must be refused."""
    monkeypatch.chdir(place)
    train_to_the_end(2, words("lora", "llama", 2, "lora", "precision=bf16", "export.dtype=bf16"), place, unproven)
    monkeypatch.setattr(export._Job, "prove", lambda self, folder: None)
    assert contents(offline(place / "lora")) == contents(place / "lora/export")

    with pytest.raises(ConfigError, match=r"tune\.r: the run has 16, given 8"):
        offline(place / "lora", "tune.r=8")
    with pytest.raises(CheckpointError, match=r"step=7: required latest, best .* 2"):
        offline(place / "lora", "step=7")
    shutil.copytree(place / "llama", place / "moved")
    assert offline(place / "lora", "model.path=moved").is_dir()
    shutil.rmtree(place / "moved")
    model_folder(place / "moved", "llama", seed=1)
    with pytest.raises(CheckpointError, match=r"it belongs to other weights .*model\.safetensors"):
        offline(place / "lora", "model.path=moved")
    part = next((place / "lora/checkpoints/step-00000002").glob("part-*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"does not verify: .*{part.name}"):
        offline(place / "lora")


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_offline_equals_live(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str, family: str, stage: int
) -> None:
    monkeypatch.chdir(place)
    name = f"{method}-{family}-{stage}"
    train_to_the_end(2, words(method, family, stage, name), place, no_fault)
    assert contents(offline(place / name)) == contents(place / name / "export")
    if method != "full":
        alone = offline(place / name, "export.merge=false")
        adapter = "adapter_model.safetensors"
        assert (alone / adapter).read_bytes() == (place / name / "export/adapter" / adapter).read_bytes()
