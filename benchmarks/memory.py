"""Memory that `sftdist plan` predicts beside what ranks really take: the state they hold, and the peak of a step.

    python -m benchmarks.memory

A Llama of 27 million parameters on two gloo ranks, packs of 2,048 tokens in two documents. Measured is the growth of a
rank's resident memory: from before the model was there until between two micro-batches of the third step (state), and
at the highest point of the second of them (peak). Freed blocks go back to the system at once, and imports are done
before. The context of the process is in neither, and messages are of 4 MiB: of the usual size they would be all that is
measured beside a model this small.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoint import resident
from benchmarks.machine import Result, command, run_on_ranks
from sftdist.core.distributed import World, session
from sftdist.data.loader import Batch, Document, pack_documents
from sftdist.model import cost
from sftdist.model.config import load_config
from sftdist.model.load import enable_checkpointing, load_model
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import LossModel
from sftdist.training.engine import Engine
from sftdist.training.optimizer import OptimizerSpec
from sftdist.training.zero_config import COMPUTE_DTYPE, EngineSpec

MIB = 2**20
PACK, VOCABULARY, CHUNK, R = 2048, 8192, 512, 16
BUCKET = 2**20  # elements of a message
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 512}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@dataclass(frozen=True)
class Setting:
    """What is trained and how; `recompute`: of how many layers."""

    stage: int
    precision: str = "bf16"
    lora: bool = False
    recompute: int = 0
    offload: bool = False

    def __str__(self) -> str:
        words = [f"ZeRO {self.stage}", self.precision, "LoRA" if self.lora else "full"]
        words += [f"{self.recompute} recomputed"] if self.recompute else []
        return ", ".join([*words, "offload"] if self.offload else words)

    def setup(self, world: int, shape: dict[str, Any], bucket: int = BUCKET) -> cost.Setup:
        return cost.Setup(
            stage=self.stage,
            world=world,
            pack_tokens=PACK,
            precision=self.precision,
            trainable=cost.lora_parameters(shape, R) if self.lora else None,
            checkpointing=self.recompute > 0,
            recompute_layers=self.recompute or None,
            offload=self.offload,
            loss_chunk=CHUNK,
            bucket=bucket,
            device="cpu",
        )


SETTINGS = (
    *(Setting(stage, precision) for stage in range(4) for precision in ("bf16", "fp32")),
    *(Setting(stage, lora=True) for stage in range(4)),
    *(Setting(stage, recompute=layers) for stage in (0, 2) for layers in (3, 6)),
    *(Setting(2, lora=True, recompute=layers) for layers in (3, 6)),
)


def engine_of(setting: Setting, shape: dict[str, Any], world: World, bucket: int = BUCKET) -> Engine:
    model: Any = load_model(
        config=load_config(None, None, shape),
        path=None,
        init="random",
        attention="sdpa",
        dtype=COMPUTE_DTYPE[setting.precision],
    )
    if setting.recompute:
        enable_checkpointing(model, layers=min(setting.recompute, shape["num_hidden_layers"]))
    if setting.lora:
        model, _ = attach(model, LoraSpec(r=R))
    extra = (
        {"zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": bucket}}
        if setting.stage
        else {}
    )
    offload = "optimizer" if setting.offload else "none"
    spec = EngineSpec(setting.stage, setting.precision, offload, 1.0, extra)
    return Engine(LossModel(model, num_sources=1, chunk=CHUNK).train(), OptimizerSpec(), spec, world)


def pack(tokens: int, vocabulary: int) -> Batch:
    """Two documents, each longer than what the CPU's attention keeps its scores of; half of the tokens supervised."""
    draw = np.random.default_rng(0)
    weights = np.zeros(tokens // 2, np.float32)
    weights[1::2] = 1.0
    rows = [draw.integers(3, vocabulary, tokens // 2).astype(np.int32) for _ in range(2)]
    return pack_documents([Document(row, weights, 0, "") for row in rows])


def step(engine: Engine, batch: Batch) -> None:
    """Two micro-batches, so that gradients are held through one."""
    for last in (False, True):
        engine.forward_backward(batch, scale=1e-3, last=last)
    engine.step(1e-4)


def measure(world: World, setting: Setting) -> dict[str, Any]:
    """Predicted and measured MiB of this rank."""
    for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(name, MIB // 4)
    warm = engine_of(setting, SMALL, world)  # imports, threads, communicators
    step(warm, pack(PACK, SMALL["vocab_size"]))
    warm.close()
    del warm
    gc.collect()
    before = resident("VmRSS")
    engine = engine_of(setting, SHAPE, world)
    batch = pack(PACK, VOCABULARY)
    step(engine, batch)
    step(engine, batch)
    engine.forward_backward(batch, scale=1e-3, last=False)
    gc.collect()
    state = resident("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")
    engine.forward_backward(batch, scale=1e-3, last=True)
    engine.step(1e-4)
    peak = resident("VmHWM") - before
    engine.close()
    parts = cost.memory(SHAPE, setting.setup(world.size, SHAPE))
    return {"parts": {name: size / MIB for name, size in parts.items()}, "state": state, "peak": peak}


def row(setting: Setting, found: dict[str, Any]) -> dict[str, Any]:
    parts = {name: size for name, size in found["parts"].items() if name != "context"}
    passing = sum(parts.get(name, 0.0) for name in cost.PASSING)
    state = sum(parts.values()) - passing
    return {
        "setting": str(setting),
        **{name: round(size, 1) for name, size in parts.items()},
        "state": state,
        "measured": found["state"],
        "state ratio": state / found["state"],
        "peak": state + passing,
        "measured ": found["peak"],
        "peak ratio": (state + passing) / found["peak"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--setting", type=int, nargs="+", default=list(range(len(SETTINGS))))
    parser.add_argument("--worker", type=Path, help="be one rank; the file of its result")
    options = parser.parse_args()
    if options.worker is not None:
        torch.set_num_threads(1)
        with session() as world:
            found = measure(world, SETTINGS[options.setting[0]])
            if world.is_main:
                options.worker.write_text(json.dumps(found), encoding="utf-8")
        return
    table = []
    for number in options.setting:
        found = run_on_ranks(options.ranks, ["-m", "benchmarks.memory", "--setting", str(number)])
        table.append(row(SETTINGS[number], found))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in table[-1].items()}, flush=True)
    ratios = [one["peak ratio"] for one in table]
    figures = {"least peak ratio": min(ratios), "largest peak ratio": max(ratios)}
    Result("memory", command("benchmarks.memory"), figures, table, str(__doc__).split("\n")[0]).save()


if __name__ == "__main__":
    main()
