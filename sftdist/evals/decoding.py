"""How the models of an evaluation answer: one setting for all of them, which the cache and the report hold."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

HF, VLLM = "hf", "vllm"
_LIBRARIES = {HF: ("torch", "transformers"), VLLM: ("torch", "vllm")}
_VLLM_BATCHES = 32  # handed over at a time: vLLM fills a place as soon as it is free


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding. `engine`: hf | vllm; `dtype` of the weights: fp32 | bf16 | fp16; `device`: cpu | cuda."""

    max_new_tokens: int = 256
    batch_size: int = 16
    engine: str = HF
    dtype: str = "fp32"
    device: str = "cpu"

    @classmethod
    def on(
        cls, device: torch.device, *, max_new_tokens: int, batch_size: int, engine: str, dtype: str | None
    ) -> Decoding:
        """What is asked for; without a dtype float32 on a CPU and bf16 elsewhere."""
        return cls(
            max_new_tokens, batch_size, engine, dtype or ("fp32" if device.type == "cpu" else "bf16"), device.type
        )

    @property
    def free_of_batches(self) -> bool:
        """Whether an answer is the same whatever shares its batch: elsewhere rounding decides between tokens that are
        nearly as likely, and rounds as the shapes are."""
        return self.engine == HF and self.dtype == "fp32" and self.device == "cpu"

    @property
    def prompts_at_a_time(self) -> int:
        """How many prompts an engine is given in one call."""
        return self.batch_size * (_VLLM_BATCHES if self.engine == VLLM else 1)

    def facts(self) -> dict[str, Any]:
        """What the answers depend on beside model and prompt, for the cache's key and for the report."""
        return {
            "engine": self.engine,
            "greedy": True,
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "device": self.device,
            "versions": {name: metadata.version(name) for name in _LIBRARIES[self.engine]},
        }
