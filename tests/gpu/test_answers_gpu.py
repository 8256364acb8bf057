"""On a GPU: bf16 answers are the same for the same batches, float32 ones are those of the CPU, also with vLLM."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.evals.decoding import Decoding
from tests.evaluated import ask_through, prompts

pytestmark = pytest.mark.gpu
PROMPTS = prompts(14)


def _gpu() -> World:
    return World(0, 1, 0, torch.device("cuda"))


def _way(engine: str = "hf", dtype: str = "bf16") -> Decoding:
    return Decoding(max_new_tokens=10, batch_size=4, engine=engine, dtype=dtype, device="cuda")


def test_bf16_answers_are_the_same_again_and_from_the_cache(tmp_path: Path) -> None:
    first = ask_through(None, PROMPTS, _way(), _gpu())
    assert ask_through(tmp_path, PROMPTS, _way(), _gpu()) == first
    assert ask_through(tmp_path, PROMPTS, _way(), _gpu()) == first


def test_float32_answers_are_those_of_the_cpu() -> None:
    on_cpu = ask_through(None, PROMPTS, Decoding(max_new_tokens=10, batch_size=4))
    assert ask_through(None, PROMPTS, _way(dtype="fp32"), _gpu()) == on_cpu


@pytest.mark.skipif(util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_says_what_transformers_says() -> None:
    on_cpu = ask_through(None, PROMPTS, Decoding(max_new_tokens=10, batch_size=4))
    assert ask_through(None, PROMPTS, _way("vllm", "fp32"), _gpu()) == on_cpu
