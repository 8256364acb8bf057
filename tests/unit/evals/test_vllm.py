"""What vLLM is asked for and how its outputs are read, with a stand-in of its documented interface: there is no vLLM on
the machines that run this test. tests/gpu asks the real one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sftdist.core.errors import ConfigError
from sftdist.core.storage import write_json
from sftdist.evals.backends.hf import HfEngine
from sftdist.evals.decoding import Decoding
from sftdist.evals.generate import answers
from sftdist.evals.voice import Voice
from tests.evaluated import BASE, CPU, alone, ask_through, prompts

DOOR = "sftdist.evals.backends.vllm"
WAY = Decoding(max_new_tokens=10, batch_size=4, engine="vllm")


class _Llm:
    """Takes the documented arguments and answers by transformers; leaves out the stop id of every other answer."""

    def __init__(self, *, model: str, dtype: str, seed: int, tensor_parallel_size: int, **engine: Any) -> None:
        assert (dtype, seed, tensor_parallel_size) == ("float32", 0, 1)
        assert set(engine) == {"max_model_len", "max_num_seqs", "enable_prefix_caching"}
        self._folder = Path(model)

    def generate(self, asked: list[dict[str, list[int]]], params: SimpleNamespace, *, use_tqdm: bool) -> list[Any]:
        assert params.temperature == 0.0
        stops = params.stop_token_ids
        engine = HfEngine.load(self._folder, stops, dtype="fp32", device=CPU, rows=0)
        said = engine.continued([tuple(prompt["prompt_token_ids"]) for prompt in asked], params.max_tokens)
        return [_output(ids, stops, keep=number % 2 == 0) for number, ids in enumerate(said)]


def _output(ids: tuple[int, ...], stops: list[int], *, keep: bool) -> SimpleNamespace:
    stopped = ids[-1] in stops
    kept = ids if keep or not stopped else ids[:-1]
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=kept, finish_reason="stop" if stopped else "length")])


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    package, inputs = ModuleType("vllm"), ModuleType("vllm.inputs")
    vars(package).update(LLM=_Llm, SamplingParams=SimpleNamespace)
    vars(inputs).update(TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    monkeypatch.delitem(sys.modules, DOOR, raising=False)
    yield import_module(DOOR)
    sys.modules.pop(DOOR, None)


def test_its_answers_are_read_as_those_of_transformers(door: ModuleType) -> None:
    asked, voice = prompts(9), Voice.load(BASE)
    found = answers(lambda: door.open_vllm(BASE, voice, WAY), asked, voice=voice, decoding=WAY, world=alone())
    assert found == ask_through(None, asked, Decoding(max_new_tokens=10, batch_size=4))
    assert any(answer.finished for answer in found)
    assert not all(answer.finished for answer in found)


def test_what_it_would_answer_to_otherwise_is_refused(door: ModuleType, tmp_path: Path) -> None:
    voice = Voice.load(BASE)
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": str(BASE)})
    with pytest.raises(ConfigError, match=r"given the adapter .*required a whole model; merge it"):
        door.open_vllm(tmp_path, voice, WAY)
    voice.template.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match=r"has \d+ rows for tokens, but the template's tokenizer has \d+"):
        door.open_vllm(BASE, voice, WAY)
