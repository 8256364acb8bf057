"""The planner: time and memory for 10 million lengths, fill on real chat data, balance of ranks, fairness of steps.

    python -m benchmarks.packing [--lengths 10000000] [--window N] [--steps 800]

Lengths are lognormal (median 400, sigma 1, capped at 8,192) in three sources that a lambda of 0.5, 0.3, 0.2 mixes;
costs are the training FLOPs of Llama 3.1 8B. Real data: the three sources of `exp=chat_small`, every row, with an
8k vocabulary trained on them; TRL's `bfd` packs the same lengths. Writes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from trl.data_utils import pack_dataset

from benchmarks.machine import GIB, SOURCES, Result, command, load, shared_data
from sftdist.core.config import compose
from sftdist.data.mask import Encoded, MaskOptions
from sftdist.data.mixture import SourceTable
from sftdist.data.packing import CostModel
from sftdist.data.plan import Plan
from sftdist.data.schema import Conversation
from sftdist.data.sources import Source, conversations
from sftdist.data.steps import PlanSpec
from sftdist.data.template import ChatTemplate
from sftdist.data.vocabulary import texts_of, train_tokenizer
from sftdist.model.cost import attention_terms, dense_flops, train_factors

RANKS, PACK = 8, 8192
LAMBDAS = {"domain": 0.5, "general": 0.3, "format": 0.2}
SIZES = {"domain": 0.6, "general": 0.3, "format": 0.1}  # shares of all conversations


def llama8b() -> CostModel:
    """Training FLOPs of Llama 3.1 8B, forward and backward."""
    shape: dict[str, Any] | None = compose("llama8b").model.shape
    assert shape is not None
    dense, attention = train_factors()
    terms = tuple((attention * flops, window) for flops, window in attention_terms(shape))
    return CostModel(dense * dense_flops(shape), terms)


def lognormal_tables(number: int) -> list[SourceTable]:
    generator = np.random.default_rng(0)
    tables = []
    for name, lam in LAMBDAS.items():
        size = round(number * SIZES[name])
        lengths = np.clip(np.rint(generator.lognormal(np.log(400), 1.0, size)), 2, PACK).astype(np.int32)
        targets = np.maximum(1.0, np.rint(lengths * generator.beta(4, 4, size)))
        tables.append(SourceTable(name, lengths, targets, np.arange(size), lam))
    return tables


def time_of_plan(tables: list[SourceTable], cost: CostModel, window: int | None) -> dict[str, Any]:
    """The whole plan of one epoch: every conversation of every pack."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = Plan(tables, PlanSpec(PACK, packs_per_step=32, window=window, epochs=1.0), cost)
    wall, cpu = time.perf_counter(), time.process_time()
    totals = plan.totals()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "conversations": totals.conversations,
        "steps": totals.steps,
        "wall seconds": wall,
        "CPU seconds": cpu,
        "peak memory GiB, everything": peak * 1024 / GIB,
        "of it before planning": before * 1024 / GIB,
        "fill": totals.fill,
        "largest error of a share": max(abs(s.share - s.lam) for s in totals.sources),
        "windows waited at most": totals.oldest,
    }


def figures_of_steps(plan: Plan, ranks: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Per step: mean / max rank cost, mean length, and the sources' shares [steps, sources]."""
    balance, length, shares = [], [], []
    for step in plan.steps_from():
        costs = step.costs(plan.cost)
        loads = [sum(costs[p] for p in rank if p >= 0) for rank in step.deal(ranks, plan.cost)]
        balance.append(np.mean(loads) / np.max(loads))
        length.append(sum(p.length.sum() for p in step.packs) / sum(len(p.length) for p in step.packs))
        shares.append(step.shares)
    return np.array(balance), np.array(length), np.array(shares)


def independent_draws(
    tables: list[SourceTable], tokens: int, steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean length and shares of steps of conversations drawn at random, lambda in the mean: the fair yardstick."""
    generator = np.random.default_rng(1)
    odds = np.array([t.lam / float(t.targets[:].mean()) for t in tables])
    mean = float(sum(o * t.lengths[:].mean() for o, t in zip(odds, tables, strict=True)) / odds.sum())
    source = generator.choice(len(tables), int(1.05 * steps * tokens / mean), p=odds / odds.sum())
    length, targets = np.empty(len(source)), np.empty(len(source))
    for s, table in enumerate(tables):
        rows = generator.integers(len(table.rows), size=int((source == s).sum()))
        length[source == s], targets[source == s] = table.lengths[rows], table.targets[rows]
    step = (np.cumsum(length) // tokens).astype(np.int64)
    counts = np.bincount(step)[:-1]  # the last step is not full
    by_source = [np.bincount(step, targets * (source == s))[:-1] for s in range(len(tables))]
    return np.bincount(step, length)[:-1] / counts, np.stack(by_source, 1) / np.sum(by_source, 0)[:, None]


def balance_row(
    name: str,
    tables: list[SourceTable],
    cost: CostModel,
    pack: int,
    packs: int,
    ranks: int,
    window: int | None,
    steps: int,
) -> dict[str, Any]:
    """One line of the table: balance and spreads of planned steps beside those of independent draws."""
    plan = Plan(tables, PlanSpec(pack, packs_per_step=packs, window=window, max_steps=steps), cost)
    balance, length, shares = figures_of_steps(plan, ranks)
    random_length, random_shares = independent_draws(tables, pack * packs, len(length))
    return {
        "lengths": name,
        "packs per rank and step": packs // ranks,
        "ranks": ranks,
        "steps": len(balance),
        "mean/max rank cost": float(balance.mean()),
        "fill": plan.totals().fill,
        "sd of mean length": float(length.std()),
        "same, random draws": float(random_length.std()),
        "sd of share": " ".join(f"{sd:.4f}" for sd in shares.std(0)),
        "same, random draws ": " ".join(f"{sd:.4f}" for sd in random_shares.std(0)),
    }


def real_tables() -> list[SourceTable]:
    """The three real sources, every row, with an 8k vocabulary and ChatML."""
    folder = shared_data()
    rows: dict[str, list[Conversation]] = {}
    for name, file in zip(LAMBDAS, SOURCES, strict=True):
        found = list(conversations(Source(name, str(folder / file))))
        rows[name] = [row for row in found if isinstance(row, Conversation)]
    texts = (text for row in chain.from_iterable(rows.values()) for text in texts_of(row))
    template = ChatTemplate.of(train_tokenizer(texts, 8192), "chatml")
    tables = []
    for name, found_rows in rows.items():
        encoded = [one for one in template.encode(found_rows, MaskOptions()) if isinstance(one, Encoded)]
        lengths = np.array([len(one.ids) for one in encoded], np.int32)
        targets = np.array([one.weights.sum() for one in encoded], np.float64)
        tables.append(SourceTable(name, lengths, targets, np.arange(len(lengths)), float(targets.sum())))
    return tables


def fill_of_trl(lengths: Sequence[int], pack: int) -> float:
    """TRL's best fit decreasing on the same lengths."""
    data = datasets.Dataset.from_dict({"input_ids": [[0] * int(n) for n in lengths]})
    packed = pack_dataset(data, pack, "bfd")
    return float(sum(lengths)) / (len(packed) * pack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, default=10_000_000)
    parser.add_argument("--window", type=int, help="conversations planned at a time; default: the plan's own")
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    cost = llama8b()
    began = load()
    tables = lognormal_tables(options.lengths)
    figures = {f"plan: {key}": value for key, value in time_of_plan(tables, cost, options.window).items()}
    figures["load average when planning began"] = began
    table = [
        balance_row("lognormal", tables, cost, PACK, RANKS * each, RANKS, options.window, options.steps)
        for each in (4, 1)
    ]
    real = real_tables()
    natural = Plan(real, PlanSpec(2048, packs_per_step=4, window=options.window, epochs=1.0), cost).totals()
    lengths = list(chain.from_iterable(t.lengths[:].tolist() for t in real))
    assert natural.tokens == sum(lengths)
    figures["real data: conversations, tokens, packs of 2,048"] = (
        f"{natural.conversations:,}, {natural.tokens:,}, {natural.packs:,}"
    )
    figures["real data: fill"] = natural.fill
    figures["real data: fill of TRL's bfd"] = fill_of_trl(lengths, 2048)
    mixed = [replace(t, lam=lam) for t, lam in zip(real, (0.4, 0.3, 0.3), strict=True)]
    table.append(balance_row("real", mixed, cost, 2048, 4, 2, options.window, options.steps))
    about = __doc__.split("\n\n")[2].replace("\n", " ") + f" Planning window: {options.window or 'the default'}."
    Result("packing", command("benchmarks.packing"), figures, table, about).save()


if __name__ == "__main__":
    main()
