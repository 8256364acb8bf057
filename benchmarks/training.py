"""`exp=chat_small` as `sftdist.train` builds it, step by step inside a benchmark, and the matrix products of a step.

with training(run_dir, ["zero.stage=1"], threads=1) as trainer:
    done = trainer.step()
    rate = products_rate(trainer, done)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from sftdist.core.config import compose
from sftdist.core.distributed import World, session
from sftdist.data.loader import Loader, Step
from sftdist.data.plan import Plan
from sftdist.data.planned import corpus_of, plan_spec
from sftdist.model.cost import train_flops
from sftdist.model.text_part import causal_lm
from sftdist.train import ready_data
from sftdist.training.build import build_trained, model_config, special_ids
from sftdist.training.engine import Engine
from sftdist.training.loop import Flags, update
from sftdist.training.opening import open_run
from sftdist.training.parts import opened
from sftdist.training.planned_model import cost_model


@dataclass(frozen=True)
class Done:
    """One optimizer step: seconds of this rank, tokens and FLOPs of all ranks; `packs`: (tokens, supervised
    positions) of this rank's micro-batches."""

    seconds: float
    tokens: int
    flops: float
    packs: list[tuple[int, int]]


@dataclass(frozen=True)
class Trainer:
    """The parts of a run, and one verb. `shape`: the model's config."""

    engine: Engine
    loader: Loader
    world: World
    shape: Mapping[str, Any]
    dtype: torch.dtype
    loss_chunk: int

    def step(self) -> Done:
        """The next optimizer step, from taking its packs to the end of its update; all ranks begin together."""
        self.world.barrier()
        began = time.perf_counter()
        step = self.loader.take()
        update(self.engine, step, self.world, 1e-4, Flags)
        return self._done(step, time.perf_counter() - began)

    def _done(self, step: Step, seconds: float) -> Done:
        flops = torch.zeros(1, dtype=torch.float64)
        for batch in step.micro:
            if batch.row_ids:  # an empty pack is no work
                flops += train_flops(self.shape, batch.lengths, len(batch.index))
        packs = [(sum(batch.lengths), len(batch.index)) for batch in step.micro]
        return Done(seconds, step.tokens, self.world.all_reduce_sum(flops).item(), packs)


@contextmanager
def training(run_dir: Path, overrides: list[str], threads: int) -> Iterator[Trainer]:
    """A trainer of `chat_small` on this rank; its data must be prepared, or is."""
    torch.set_num_threads(threads)
    cfg = compose("chat_small", [*overrides, f"run.dir={run_dir}", "tracking.wandb=disabled"])
    with ExitStack() as stack:
        opening = open_run(cfg, run_dir, stack, partial(ready_data, cfg))
        world = stack.enter_context(session())
        corpus = corpus_of(cfg, opened(cfg, opening))
        tokenizer = corpus.template.tokenizer
        config = model_config(cfg, len(tokenizer), special_ids(tokenizer))
        plan = Plan(corpus.tables, plan_spec(cfg), cost_model(config, cfg.tune, corpus.supervised_share))
        trained = build_trained(cfg, corpus, config, world)
        loader = stack.enter_context(
            Loader(plan, corpus.stores, rank=world.rank, world_size=world.size, device=world.device)
        )
        dtype = next(trained.engine.module.parameters()).dtype
        yield Trainer(trained.engine, loader, world, config.to_dict(), dtype, cfg.model.loss_chunk)
        trained.engine.close()


# The matrix products of a step -------------------------------------------------------------------------------------

Product = tuple[int, int, int]  # rows (tokens), input and output size of a linear layer


def products_of(trainer: Trainer, packs: list[tuple[int, int]]) -> Counter[Product]:
    """How often the packs go through a linear layer of each shape; the head sees supervised positions, in chunks."""
    model = causal_lm(trainer.engine.module.model)
    head = model.get_output_embeddings()
    found: Counter[Product] = Counter()
    for tokens, supervised in packs:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                found[tokens, layer.in_features, layer.out_features] += 1
        rows = [trainer.loss_chunk] * (supervised // trainer.loss_chunk) + [supervised % trainer.loss_chunk]
        for count in filter(None, rows):
            found[count, head.in_features, head.out_features] += 1
    return found


def product_seconds(product: Product, dtype: torch.dtype, repeats: int) -> float:
    """Forward and both products of the backward of one linear layer, alone, in random numbers."""
    rows, inputs, outputs = product
    x, weight, gradient = (
        torch.randn(size, dtype=dtype) for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )

    def once() -> None:
        linear(x, weight)
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), x)

    once()
    began = time.perf_counter()
    for _ in range(repeats):
        once()
    return (time.perf_counter() - began) / repeats


@dataclass(frozen=True)
class Rate:
    """The products of a step, run alone on this rank: their FLOPs, their seconds, and the rate by shape in GFLOP/s."""

    flops: float
    seconds: float
    by_shape: dict[str, float]

    @property
    def per_second(self) -> float:
        return self.flops / self.seconds


def products_rate(trainer: Trainer, packs: list[tuple[int, int]], repeats: int = 3) -> Rate:
    """All products of these packs, forward and backward, at the rate of each shape; all ranks measure together.

    Packs are all about full: the rows of one stand for the others' of the same layer.
    """
    trainer.world.barrier()
    tokens, supervised = packs[0]
    flops = seconds = 0.0
    by_shape = {}
    for (rows, inputs, outputs), count in sorted(products_of(trainer, [(tokens, supervised)]).items()):
        took = product_seconds((rows, inputs, outputs), trainer.dtype, repeats)
        work = 6.0 * rows * inputs * outputs
        flops, seconds = flops + count * work, seconds + count * took
        by_shape[f"{rows} x {inputs} x {outputs}"] = work / took / 1e9
    return Rate(flops, seconds, by_shape)
