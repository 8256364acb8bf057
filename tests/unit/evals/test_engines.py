"""The engines: what each one needs is said before anything is loaded, and every kind of model answers alike."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.data.template import ChatTemplate
from sftdist.evals.backends.hf import HfEngine
from sftdist.evals.decoding import Decoding
from sftdist.evals.engines import require_engine
from sftdist.evals.generate import ask
from sftdist.evals.identity import identify
from sftdist.evals.voice import Voice
from sftdist.model.load import load_strictly
from sftdist.model.lora import LoraSpec, attach
from tests.evaluated import BASE, CPU, prompts
from tests.models import SHAPES, shape


@pytest.mark.parametrize("family", sorted(SHAPES))
def test_padding_changes_no_answer_of_any_architecture(family: str) -> None:
    """Learned positions, windows shorter than the padding, sinks, experts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape(family)))
    engine = HfEngine(model, [2])
    asked = [tuple(range(3, 3 + length)) for length in (30, 17, 9, 2, 1)]
    together = engine.continued(asked, 8)
    assert together == [engine.continued([ids], 8)[0] for ids in asked]
    assert len(set(together)) > 1


def test_vllm_is_asked_for_where_it_is_not() -> None:
    if util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    with pytest.raises(ConfigError, match=r"vllm is not installed; install it with pip install .*evals.engine=hf"):
        require_engine("vllm", 1)
    require_engine("hf", 3)


def test_vllm_takes_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"given 2 ranks, required one process.*without torchrun"):
        require_engine("vllm", 2)


def _copy_without(folder: Path, name: str) -> Path:
    for file in BASE.glob("*"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_tensor_that_is_missing_is_no_random_one(tmp_path: Path) -> None:
    name = next(name for name in load_file(BASE / "model.safetensors") if name.endswith("q_proj.weight"))
    with pytest.raises(CheckpointError, match=f"missing keys.*{name}"):
        ask(_copy_without(tmp_path, name), prompts(2))


def test_an_adapter_answers_on_the_base_that_it_names(tmp_path: Path) -> None:
    """As the merged model does, and otherwise than the base; the tokenizer may be its base's, too."""
    torch.manual_seed(3)
    adapted, _ = attach(load_strictly(BASE, torch.float32), LoraSpec(r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(str(adapter))
    adapted.merge_and_unload().save_pretrained(str(merged))
    ChatTemplate.load(str(BASE)).save(merged)
    asked = prompts(4)
    assert ask(adapter, asked, max_new_tokens=6) == ask(merged, asked, max_new_tokens=6)
    assert ask(adapter, asked, max_new_tokens=6) != ask(BASE, asked, max_new_tokens=6)
    assert "base/tokenizer.json" in identify(adapter).files


def test_a_base_with_a_smaller_vocabulary_gets_the_rows_that_training_began_with() -> None:
    voice = Voice.load(BASE)
    engine = HfEngine.load(BASE, voice.stop_ids, dtype="fp32", device=CPU, rows=voice.rows + 5)
    same = HfEngine.load(BASE, voice.stop_ids, dtype="fp32", device=CPU, rows=voice.rows)
    ids = voice.encode(prompts(2)[0])
    assert engine.continued([ids], 4) == same.continued([ids], 4)
    assert engine.continued([(*ids, voice.rows + 4)], 4)


def test_bf16_is_the_default_on_a_gpu() -> None:
    def dtype(device: str, given: str | None) -> str:
        way = Decoding.on(torch.device(device), max_new_tokens=1, batch_size=1, engine="hf", dtype=given)
        return f"{way.dtype} on {way.device}"

    assert dtype("cpu", None) == "fp32 on cpu"
    assert dtype("cuda", None) == "bf16 on cuda"
    assert dtype("cuda", "fp32") == "fp32 on cuda"


def test_only_float32_on_a_cpu_is_free_of_batches() -> None:
    assert Decoding().free_of_batches
    assert not Decoding(dtype="bf16").free_of_batches
    assert not Decoding(device="cuda").free_of_batches
    assert not Decoding(engine="vllm").free_of_batches
