"""Time and memory of a save and a load of our checkpoints, and how long training waits for a save.

    python -m benchmarks.checkpoint [--millions 5 20 80] [--ranks 2 4] [--stages 2 3] [--repeats 3]

Random Llama shapes in bf16 with AdamW, on CPU ranks of this machine. Each setting is a torchrun of its own: a step of
training, `--repeats` saves and one load (the median of the saves; the slowest rank counts), then twice 16 steps with a
save after the sixth, once without and once with `checkpoint.background`. Memory is the growth of a rank's resident
memory over what the engine holds. The page cache takes what is written; a save ends with an fsync. Costs of 8B
and 70B on 8 to 64 GPUs follow on paper (`benchmarks.checkpoint_plan`). Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.checkpoint_plan import notes, plan_table
from benchmarks.machine import Result, command, load, run_on_ranks
from sftdist.core.distributed import World, session
from sftdist.data.loader import Batch, Document, pack_documents
from sftdist.model.config import load_config
from sftdist.model.load import load_model
from sftdist.model.loss import LossModel
from sftdist.training.checkpoint import Checkpoints, checkpoint_bytes
from sftdist.training.engine import Engine
from sftdist.training.optimizer import OptimizerSpec
from sftdist.training.retention import Keep
from sftdist.training.zero_config import EngineSpec

MIB = 2**20
STEPS, SAVED_AFTER = 16, 6
PACK_TOKENS = 256  # one pack a rank makes a step
# Hidden size and layers by millions of parameters; the vocabulary is 8,192.
SHAPES = {5: (192, 4), 20: (384, 8), 80: (768, 9)}


def shape(millions: int) -> dict[str, Any]:
    """A Llama of about so many million parameters, embeddings and head included."""
    hidden, layers = SHAPES[millions]
    return {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
    }


# One rank ----------------------------------------------------------------------------------------------------------


def engine_of(millions: int, stage: int, world: World) -> Engine:
    model = load_model(config=load_config(None, None, shape(millions)), path=None, init="random", attention="sdpa")
    spec = EngineSpec(
        stage=stage,
        precision="bf16",
        extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}},  # or a small model is never partitioned
    )
    return Engine(LossModel(model, num_sources=1, chunk=1024).train(), OptimizerSpec(), spec, world)


def pack(seed: int) -> Batch:
    """Random tokens as one pack of two documents, every token a target."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(8192, (2, PACK_TOKENS // 2), generator=generator, dtype=torch.int32).numpy()
    weights = torch.ones(PACK_TOKENS // 2).numpy()
    weights[0] = 0.0
    return pack_documents([Document(ids, weights, 0, "") for ids in rows])


def train_step(engine: Engine, world: World, number: int) -> None:
    engine.forward_backward(pack(100 * number + world.rank), scale=1.0 / PACK_TOKENS, last=True)
    engine.step(1e-4)


@contextmanager
def measured(world: World, into: dict[str, float]) -> Iterator[None]:
    """Seconds and growth of resident memory (MiB) of the block, of the slowest and the largest rank."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    world.barrier()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    into["seconds"] = world.all_reduce_max(seconds)
    into["memory_mib"] = world.all_reduce_max(resident("VmHWM") - before)


def resident(key: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) / 1024


def gather_seconds(engine: Engine, world: World) -> float:
    """Gathering alone: what every save does before it copies."""
    figures: dict[str, float] = {}
    with measured(world, figures):
        for _ in engine.state():
            pass
    return figures["seconds"]


def save_and_load(engine: Engine, world: World, folder: Path, repeats: int) -> dict[str, float]:
    checkpoints = Checkpoints(folder / "checkpoints", Keep(last=1))
    saves: list[dict[str, float]] = [{} for _ in range(repeats)]
    for number, figures in enumerate(saves, 1):
        with measured(world, figures):
            checkpoints.save(engine, {}, number)
    loaded: dict[str, float] = {}
    with measured(world, loaded):
        checkpoints.load_latest(engine, say=lambda text: None)
    return {
        "gather_s": median(gather_seconds(engine, world) for _ in range(repeats)),
        "save_s": median(one["seconds"] for one in saves),
        "save_mib": max(one["memory_mib"] for one in saves),
        "load_s": loaded["seconds"],
        "load_mib": loaded["memory_mib"],
    }


def stall(engine: Engine, world: World, folder: Path, *, background: bool) -> dict[str, float]:
    """Steps of training with one save: how long it holds them up, and what it costs in all, the slower steps while a
    thread writes included; and the memory (MiB) that is held when the save returns."""
    checkpoints = Checkpoints(folder / "checkpoints", Keep(last=1), background=world.beside() if background else None)
    steps = []
    waited = held = 0.0
    for number in range(1, STEPS + 1):
        world.barrier()
        started = time.perf_counter()
        train_step(engine, world, number)
        if number == SAVED_AFTER:
            before, trained = resident("VmRSS"), time.perf_counter()
            checkpoints.save(engine, {}, number)
            waited, held = time.perf_counter() - trained, resident("VmRSS") - before
        steps.append(time.perf_counter() - started)
    started = time.perf_counter()
    checkpoints.wait()
    left = time.perf_counter() - started
    usual = median(steps[: SAVED_AFTER - 1])
    return {
        "step": world.all_reduce_max(usual),
        "stall": world.all_reduce_max(waited),
        "cost": world.all_reduce_max(sum(steps) + left - STEPS * usual),
        "held": world.all_reduce_max(held),
    }


def worker(millions: int, stage: int, repeats: int, file: Path) -> None:
    """One setting, on this rank; checkpoints go beside the file of the result."""
    folder = file.parent
    torch.set_num_threads(1)
    with session() as world:
        engine = engine_of(millions, stage, world)
        train_step(engine, world, 0)
        train_step(engine, world, 0)
        size = checkpoint_bytes(engine) / MIB
        figures = save_and_load(engine, world, folder / "times", repeats)
        usual = stall(engine, world, folder / "waiting", background=False)
        behind = stall(engine, world, folder / "background", background=True)
        engine.close()
        row = {
            "parameters": sum(one.numel() for one in engine.shapes().values()),
            "ranks": world.size,
            "zero": stage,
            "checkpoint_mib": size,
            **figures,
            "step_s": usual["step"],
            "stall_s": usual["stall"],
            "stall_background_s": behind["stall"],
            "cost_s": usual["cost"],
            "cost_background_s": behind["cost"],
            "background_mib": behind["held"],
        }
        if world.is_main:
            file.write_text(json.dumps(row), encoding="utf-8")


# All settings ------------------------------------------------------------------------------------------------------


def run_setting(millions: int, ranks: int, stage: int, repeats: int) -> dict[str, Any]:
    words = ["-m", "benchmarks.checkpoint", "--millions", str(millions)]
    words += ["--stages", str(stage), "--repeats", str(repeats)]
    loaded = load()
    return {**run_on_ranks(ranks, words), "load": loaded}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[5, 20, 80], choices=sorted(SHAPES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="only print what is computed")
    parser.add_argument("--worker", type=Path, help="be one rank of one setting; the file of its result")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.worker is not None:
        worker(args.millions[0], args.stages[0], args.repeats, args.worker)
        return 0
    table: list[dict[str, Any]] = []
    for millions in [] if args.paper else args.millions:
        for ranks in args.ranks:
            for stage in args.stages:
                table.append(run_setting(millions, ranks, stage, args.repeats))
                print(table[-1], flush=True)
    paper = plan_table()
    result = Result(
        "checkpoint",
        command("benchmarks.checkpoint"),
        figures_of(table),
        table,
        about=str(__doc__).split("\n")[0],
        more={"On paper: 8B and 70B": paper},
        notes=notes(paper),
    )
    if args.paper:
        print(result.markdown(time.strftime("%Y-%m-%d", time.gmtime())))
        return 0
    result.save()
    return 0


def figures_of(table: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table comes to: the speed of saves and loads, and how much of a stall the background takes away."""
    if not table:
        return {}
    return {
        "save_mib_per_second": median(row["checkpoint_mib"] / row["save_s"] for row in table),
        "load_mib_per_second": median(row["checkpoint_mib"] / row["load_s"] for row in table),
        "stall_with_background_over_without": median(row["stall_background_s"] / row["stall_s"] for row in table),
        "cost_with_background_over_without": median(row["cost_background_s"] / row["cost_s"] for row in table),
        "save_memory_over_a_ranks_share": median(
            row["save_mib"] * row["ranks"] / row["checkpoint_mib"] for row in table
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
