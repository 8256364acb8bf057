"""How evenly a step's work falls on the ranks: our plan beside random order, token-balanced batches and TRL's packs.

    python -m benchmarks.balance [--steps 48] [--conversations 400000]

Mean over maximum of the ranks' training FLOPs per step, averaged over steps: the share of the machine's time that is
work, where ranks wait for the slowest. Lengths are lognormal (median 400, sigma 1; for packs of 32k a longer tail with
sigma 1.5, too), each capped at the pack, and real (the sources of `exp=chat_small`, lengths times 4 and 16). Costs are
those of a 7B and of a 0.5B model. The peers:

- random: packs by first fit in random order (the open pack that holds it, of the last 64), dealt at random.
- tokens: the conversations of a global batch dealt to the ranks' micro-batches by tokens, the longest first, as
  InstructLab's trainer does (LPT, Graham 1969); packs that do not hold them all get one more micro-batch each.
- TRL: `pack_dataset` with `bfd`, a window of 1,000 rows at a time, in the random order of its sampler.

`bound`: what no order of these documents can exceed with one pack a rank, for the costliest of a step makes a rank that
slow all by itself. Fair: the spread of the steps' mean length, and of the sources' shares, beside independent draws.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from trl.data_utils import pack_dataset

from benchmarks.machine import Result, command
from benchmarks.packing import LAMBDAS, SIZES, figures_of_steps, independent_draws, real_tables
from sftdist.data.mixture import SourceTable
from sftdist.data.packing import CostModel
from sftdist.data.plan import Plan
from sftdist.data.steps import PlanSpec
from sftdist.model.cost import attention_terms, dense_flops, head_flops, train_factors

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

RANKS = (8, 64, 512)
PACKS_PER_RANK = (4, 1)
AIMS = {4: 0.99, 1: 0.97}
SUPERVISED = 0.5
OPEN_PACKS = 64
PEER_STEPS = 12
PEER_TOKENS = 2**25  # packed as the peers do
LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def cost_of(shape: dict[str, Any]) -> CostModel:
    """FLOPs of a full fine-tune, forward and backward; the head at half of the tokens."""
    dense, attention = train_factors()
    terms = tuple((attention * flops, window) for flops, window in attention_terms(shape))
    return CostModel(dense * (dense_flops(shape) + SUPERVISED * head_flops(shape)), terms)


def lognormal(number: int, pack: int, sigma: float) -> list[SourceTable]:
    generator = np.random.default_rng(0)
    tables = []
    for name, lam in LAMBDAS.items():
        size = round(number * SIZES[name])
        lengths = np.clip(np.rint(generator.lognormal(np.log(400), sigma, size)), 2, pack).astype(np.int32)
        targets = np.maximum(1.0, np.rint(lengths * generator.beta(4, 4, size)))
        tables.append(SourceTable(name, lengths, targets, np.arange(size), lam))
    return tables


def scaled(tables: Sequence[SourceTable], pack: int) -> list[SourceTable]:
    """Real lengths, made for packs of 2,048, times what makes them as long for this pack."""
    factor = pack // 2048
    return [
        replace(table, lengths=np.minimum(table.lengths[:] * factor, pack), targets=table.targets[:] * factor, lam=lam)
        for table, lam in zip(tables, LAMBDAS.values(), strict=True)
    ]


def drawn(tables: Sequence[SourceTable], tokens: int) -> Ints:
    """Lengths of conversations drawn at random, lambda in the mean, with at least so many tokens."""
    generator = np.random.default_rng(2)
    odds = np.array([table.lam / float(table.targets[:].mean()) for table in tables])
    mean = float(sum(o * table.lengths[:].mean() for o, table in zip(odds, tables, strict=True)) / odds.sum())
    source = generator.choice(len(tables), int(1.1 * tokens / mean) + 64, p=odds / odds.sum())
    lengths = np.empty(len(source), np.int64)
    for s, table in enumerate(tables):
        lengths[source == s] = generator.choice(table.lengths[:], int((source == s).sum()))
    return lengths


def balance_of(loads: Floats) -> float:
    """Mean over steps of mean / maximum; `loads` float64 [steps, ranks]."""
    return float((loads.mean(1) / loads.max(1)).mean())


def dealt(costs: Floats, ranks: int, each: int) -> Floats:
    """Loads [steps, ranks] where each rank gets `each` packs, drawn at random from packs of these costs."""
    return np.random.default_rng(3).choice(costs, (PEER_STEPS, ranks, each)).sum(2)


def first_fit(lengths: Ints, pack: int, cost: Floats) -> Floats:
    """Costs of packs by first fit among the last `OPEN_PACKS` ones."""
    room: list[int] = []
    held: list[float] = []
    done: list[float] = []
    for length, flops in zip(lengths.tolist(), cost.tolist(), strict=True):
        place = next((i for i, one in enumerate(room) if one >= length), None)
        if place is None:
            room.append(pack)
            held.append(0.0)
            place = len(room) - 1
        room[place] -= length
        held[place] += flops
        if len(room) > OPEN_PACKS:
            fullest = room.index(min(room))
            room.pop(fullest)
            done.append(held.pop(fullest))
    return np.array(done)


def by_tokens(lengths: Ints, cost: Floats, pack: int, ranks: int, each: int) -> Iterator[Floats]:
    """Loads of the ranks, step by step, where a batch as large as the packs is dealt by tokens."""
    ends = np.searchsorted(np.cumsum(lengths), np.arange(1, PEER_STEPS + 1) * 0.95 * ranks * each * pack)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        yield _batch_by_tokens(lengths[start:stop], cost[start:stop], pack, ranks, each)


def _batch_by_tokens(lengths: Ints, cost: Floats, pack: int, ranks: int, each: int) -> Floats:
    while True:
        packs = [(0, number) for number in range(ranks * each)]
        load = np.zeros(ranks)
        for one in np.argsort(-lengths, kind="stable"):
            tokens, number = heapq.heappop(packs)
            if tokens + lengths[one] > pack:
                break
            load[number % ranks] += cost[one]
            heapq.heappush(packs, (tokens + int(lengths[one]), number))
        else:
            return load
        each += 1


def packs_of_trl(lengths: Ints, pack: int, cost: CostModel) -> Floats:
    """Costs of TRL's packs: of each the lengths of its documents are in `seq_lengths`."""
    data = datasets.Dataset.from_dict({"input_ids": [np.zeros(n, np.int8) for n in lengths]})
    packed = pack_dataset(data, pack, "bfd")
    return np.array([float(cost.of(np.array(row)).sum()) for row in packed["seq_lengths"]])


def ours(tables: list[SourceTable], cost: CostModel, pack: int, ranks: int, each: int, steps: int) -> dict[str, Any]:
    """Balance, bound and fairness of the plan's first steps, and the CPU seconds of a million conversations."""
    plan = Plan(tables, PlanSpec(pack, packs_per_step=ranks * each, max_steps=steps), cost)
    began = time.process_time()
    planned = list(plan.steps_from())
    seconds = time.process_time() - began
    balance, length, shares = figures_of_steps(plan, ranks)
    random_length, random_shares = independent_draws(tables, pack * ranks * each, len(length))
    bounds = [bound(step.costs(cost).sum() / ranks, [cost.of(p.length).max() for p in step.packs]) for step in planned]
    return {
        "ours": float(balance.mean()),
        "aim": AIMS[each],
        "bound": float(np.mean(bounds)) if each == 1 else 1.0,
        "fill": float(np.mean([p.length.sum() for step in planned for p in step.packs])) / pack,
        "sd of length": float(length.std()),
        "random": float(random_length.std()),
        "largest sd of share": float(shares.std(0).max()),
        "random ": float(random_shares.std(0).max()),
        "CPU s per million": 1e6 * seconds / sum(len(p.length) for step in planned for p in step.packs),
    }


def bound(mean: float, documents: Sequence[float]) -> float:
    return min(1.0, mean / max(documents))


def rows(name: str, tables: list[SourceTable], model: str, pack: int, steps: int) -> Iterator[dict[str, Any]]:
    cost = cost_of({"7B": LLAMA_7B, "0.5B": QWEN_05B}[model])
    sample = drawn(tables, PEER_TOKENS)
    fitted, trl = first_fit(sample, pack, cost.of(sample)), packs_of_trl(sample, pack, cost)
    for ranks in RANKS:
        for each in PACKS_PER_RANK:
            lengths = drawn(tables, PEER_STEPS * ranks * each * pack)
            flops = cost.of(lengths)
            tokens = np.stack(list(by_tokens(lengths, flops, pack, ranks, each)))
            yield {
                "lengths": name,
                "pack": pack,
                "model": model,
                "ranks": ranks,
                "packs a rank": each,
                **ours(tables, cost, pack, ranks, each, steps if ranks < 512 else max(4, steps // 8)),
                "random order": balance_of(dealt(fitted, ranks, each)),
                "tokens": balance_of(tokens),
                "TRL": balance_of(dealt(trl, ranks, each)),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--conversations", type=int, default=400_000)
    options = parser.parse_args()
    real = real_tables()
    sets = [
        ("lognormal", 8192, lognormal(options.conversations, 8192, 1.0)),
        ("lognormal", 32768, lognormal(options.conversations, 32768, 1.0)),
        ("long tail", 32768, lognormal(options.conversations, 32768, 1.5)),
        ("real x 4", 8192, scaled(real, 8192)),
        ("real x 16", 32768, scaled(real, 32768)),
    ]
    table = []
    for name, pack, tables in sets:
        for model in ("7B", "0.5B"):
            for row in rows(name, tables, model, pack, options.steps):
                print(row, flush=True)
                table.append(row)
    reached = [row for row in table if row["ours"] >= row["aim"]]
    figures = {"rows": len(table), "aim reached": len(reached)}
    for each in PACKS_PER_RANK:
        mine = [row for row in table if row["packs a rank"] == each]
        figures[f"least with {each} packs a rank"] = min(row["ours"] for row in mine)
        figures[f"missed with {each} packs a rank"] = sum(row["ours"] < row["aim"] for row in mine)
    Result("balance", command("benchmarks.balance"), figures, table, str(__doc__).split("\n")[0]).save()


if __name__ == "__main__":
    main()
