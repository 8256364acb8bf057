"""How long ranks wait for each other: the CPU seconds of every step's work on real gloo ranks, beside random order.

    python -m benchmarks.waiting [--ranks 2 4] [--steps 8]

A small Llama trains on long-tailed lengths (lognormal, median 150, sigma 1.2, packs of 2,048), ZeRO 0, one thread a
rank. A rank's work is the CPU time of its forward and backward passes, which does not depend on how many ranks share a
core; the slowest rank of a step sets its end, and what the others have left until then is waiting. `planned` is what
the plan expects by FLOPs. Random order: packs filled with conversations as they come, dealt as they come.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import Result, command, run_on_ranks
from sftdist.core.distributed import World, session
from sftdist.data.loader import Batch, Document, pack_documents
from sftdist.data.mixture import SourceTable
from sftdist.data.packing import CostModel
from sftdist.data.plan import Plan
from sftdist.data.steps import PlanSpec
from sftdist.model.config import load_config
from sftdist.model.cost import attention_terms, dense_flops, head_flops, train_factors
from sftdist.model.load import load_model
from sftdist.model.loss import LossModel
from sftdist.training.engine import Engine
from sftdist.training.optimizer import OptimizerSpec
from sftdist.training.zero_config import EngineSpec

PACK, VOCABULARY = 2048, 512
REPEATS = 3
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
Packs = list[list[int]]  # lengths of the documents of each


def lengths_of(number: int) -> NDArray[np.int32]:
    drawn = np.random.default_rng(0).lognormal(np.log(150), 1.2, number)
    return np.clip(np.rint(drawn), 2, PACK).astype(np.int32)


def cost_model() -> CostModel:
    dense, attention = train_factors()
    terms = tuple((attention * flops, window) for flops, window in attention_terms(SHAPE))
    return CostModel(dense * (dense_flops(SHAPE) + head_flops(SHAPE)), terms)


def ours(ranks: int, each: int, steps: int) -> Iterator[list[Packs]]:
    """Per step the packs of every rank, as the plan deals them."""
    lengths = lengths_of(20_000)
    table = SourceTable("one", lengths, lengths.astype(np.float64) - 1, np.arange(len(lengths)), 1.0)
    plan = Plan([table], PlanSpec(PACK, packs_per_step=ranks * each, max_steps=steps), cost_model())
    for step in plan.steps_from():
        dealt = step.deal(ranks, plan.cost)
        yield [[step.packs[pack].length.tolist() if pack >= 0 else [1] for pack in rank] for rank in dealt]


def in_random_order(ranks: int, each: int, steps: int) -> Iterator[list[Packs]]:
    packs: Packs = [[]]
    for length in lengths_of(20_000).tolist():
        if sum(packs[-1]) + length > PACK:
            packs.append([])
        packs[-1].append(length)
    for step in range(steps):
        mine = packs[step * ranks * each :][: ranks * each]
        yield [mine[rank * each :][:each] for rank in range(ranks)]


def batch_of(lengths: Sequence[int], seed: int) -> Batch:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    return pack_documents([Document(row, np.ones(len(row), np.float32), 0, "") for row in rows])


def measure(world: World, each: int, steps: int) -> dict[str, dict[str, float]]:
    """Shares of the ranks' time that are work: planned by FLOPs and measured, for the plan and for random order."""
    model = load_model(config=load_config(None, None, SHAPE), path=None, init="random", attention="sdpa")
    engine = Engine(LossModel(model, 1, chunk=1024).train(), OptimizerSpec(), EngineSpec(0, "fp32"), world)
    work_of(engine, [[PACK], [2] * 300])  # the first passes pay for what is made once
    found = {}
    for name, order in (("plan", ours), ("random order", in_random_order)):
        cost, planned, took = cost_model(), [], []
        for step in order(world.size, each, steps):
            flops = [sum(float(cost.of(np.array(pack)).sum()) for pack in packs) for packs in step]
            planned.append(np.mean(flops) / np.max(flops))
            seconds = torch.zeros(world.size, dtype=torch.float64)
            seconds[world.rank] = work_of(engine, step[world.rank])
            took.append(world.all_reduce_sum(seconds))
            engine.step(1e-4)
        loads = torch.stack(took)
        work = float(loads.mean(1).sum() / loads.max(1).values.sum())
        found[name] = {"planned": float(np.mean(planned)), "measured": work, "waiting": 1 - work}
    engine.close()
    return found


def work_of(engine: Engine, packs: Packs) -> float:
    """CPU seconds of this rank's forward and backward passes, collectives left out: of each pack the least of three,
    for neighbours on the machine only ever add to it."""
    batches = [batch_of(lengths, number) for number, lengths in enumerate(packs)]
    return sum(min(seconds_of(engine, batch) for _ in range(REPEATS)) for batch in batches)


def seconds_of(engine: Engine, batch: Batch) -> float:
    began = time.thread_time()
    engine.forward_backward(batch, scale=1e-4, last=False)
    return time.thread_time() - began


def worker(each: int, steps: int, file: Path) -> None:
    torch.set_num_threads(1)
    with session() as world:
        found = measure(world, each, steps)
        if world.is_main:
            file.write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--each", type=int, nargs="+", default=[4, 1], help="packs of a rank and step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", type=Path, help="be one rank; the file for what was found")
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.each[0], options.steps, options.worker)
        return
    table = []
    for ranks in options.ranks:
        for each in options.each:
            words = ["-m", "benchmarks.waiting", "--each", str(each), "--steps", str(options.steps)]
            found = run_on_ranks(ranks, words)
            for name, row in found.items():
                table.append({"ranks": ranks, "packs a rank": each, "order": name, **row})
                print(table[-1], flush=True)
    worst = {name: max(row["waiting"] for row in table if row["order"] == name) for name in ("plan", "random order")}
    figures = {f"longest waiting, {name}": share for name, share in worst.items()}
    Result("waiting", command("benchmarks.waiting"), figures, table, str(__doc__).split("\n")[0]).save()


if __name__ == "__main__":
    main()
