"""Step times that `sftdist plan` predicts beside published ones, in tokens per second and GPU.

    python -m benchmarks.predictions

torchtitan: benchmarks/llama3_h100_202412_torchtitan.md in its repository, tables 1 and 3: Llama 3.1 8B on H100 with
2.4 TB/s at 500 W, FSDP, sequences of 8,192, 2 for each GPU, selective checkpointing (counted as half of the layers).
NeMo Automodel: docs/performance-summary.mdx in its repository: LoRA on one H100, sequences of 4,096.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.machine import Result, command
from sftdist.model import cost
from sftdist.model.hardware import GPUS, Cluster
from sftdist.model.timing import Work, full_packs, step_seconds

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN_7B: dict[str, Any] = {
    **LLAMA_8B,
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Published:
    """One published run: `packs` sequences of `length` tokens for each GPU and step; `rate`: tokens/s and GPU."""

    name: str
    config: dict[str, Any]
    work: Work
    cluster: Cluster
    packs: int
    length: int
    rate: float

    @property
    def predicted(self) -> float:
        step = full_packs(self.config, self.packs * self.cluster.gpus, self.length, self.length, 1.0)
        return self.packs * self.length / step_seconds(self.config, self.work, step, self.cluster).total


def _lora(name: str, config: dict[str, Any], rate: float) -> Published:
    work = Work(method="lora", trainable=cost.lora_parameters(config, 16))
    return Published(name, config, work, Cluster(GPUS["H100"], 1), 1, 4096, rate)


def _titan(name: str, gpus: int, rate: float, *, fused: bool = False) -> Published:
    slow = replace(GPUS["H100"], memory_rate=2.4e12)
    return Published(name, LLAMA_8B, Work(3, recomputed=16, fused=fused), Cluster(slow, gpus), 2, 8192, rate)


PUBLISHED = (
    _titan("torchtitan, Llama 3.1 8B, 8 GPUs", 8, 5762),
    _titan("torchtitan, Llama 3.1 8B, 8 GPUs, compiled", 8, 6667, fused=True),
    _titan("torchtitan, Llama 3.1 8B, 128 GPUs", 128, 5605),
    _lora("NeMo Automodel, Llama 3 8B, LoRA, 1 GPU", LLAMA_8B, 12473),
    _lora("NeMo Automodel, Qwen 2.5 7B, LoRA, 1 GPU", QWEN_7B, 14110),
)


def main() -> None:
    table = [
        {"run": one.name, "published": one.rate, "predicted": one.predicted, "ratio": one.predicted / one.rate}
        for one in PUBLISHED
    ]
    ratios = [one.predicted / one.rate for one in PUBLISHED]
    figures = {"least ratio": min(ratios), "largest ratio": max(ratios)}
    about, sources = str(__doc__).split("\n")[0], str(__doc__).split("\n\n")[2].replace("\n", " ")
    Result("predictions", command("benchmarks.predictions"), figures, table, about, notes=[sources]).save()


if __name__ == "__main__":
    main()
