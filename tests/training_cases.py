"""Steps of a tiny model that any world size and ZeRO stage can take, and the plain loop that they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sftdist.core.distributed import World
from sftdist.data.loader import Batch, Document, Step, empty_pack, pack_documents, supervised_weight
from sftdist.data.steps import LoaderState, WindowState
from sftdist.model.load import enable_checkpointing
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import LossModel, supervised_positions
from sftdist.model.quantised import quantise, whole
from sftdist.training.engine import Engine, StepOutcome
from sftdist.training.optimizer import OptimizerSpec
from sftdist.training.zero_config import COMPUTE_DTYPE, EngineSpec
from tests.models import VOCABULARY, tiny_model
from tests.packed import IGNORED, random_row

NO_PERSISTENCE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SGD = OptimizerSpec(name="sgd", momentum=0.9)
ADAMW = OptimizerSpec(weight_decay=0.1)

Scale = Callable[[Batch, Sequence[Batch], float, int], float]


@dataclass(frozen=True)
class Case:
    """One training run. `lora`: train adapters of this rank, with dropout in them, instead of the weights."""

    stage: int
    precision: str = "fp32"
    family: str = "llama_tied"
    optimizer: OptimizerSpec = SGD
    lrs: tuple[float, ...] = (0.2, 0.1, 0.05)
    max_grad_norm: float = 1.0
    changes: dict[str, Any] = field(default_factory=dict)
    offload: str = "none"
    lora: LoraSpec | None = None
    rows: tuple[int, ...] = ()  # token rows that train beside the adapters
    checkpointing: bool = False  # of activations
    attention: str = "sdpa"
    double_quant: bool | None = None  # the base in 4 bits, its constants too, or not; None: not quantised


def make_module(case: Case) -> LossModel:
    """The loss model of a case, the same on every rank."""
    model: Any = tiny_model(case.family, attention=case.attention, **case.changes)
    if case.checkpointing:
        enable_checkpointing(model)
    if case.double_quant is not None:
        dtype, is_partitioned = COMPUTE_DTYPE[case.precision], case.stage == 3
        cpu = torch.device("cpu")
        quantise(model, double_quant=case.double_quant, dtype=dtype, device=cpu, floating=is_partitioned)
    if case.lora is not None:
        torch.manual_seed(1)
        model, _ = attach(model, case.lora, train_rows=case.rows)
    return LossModel(model, num_sources=2, chunk=16).train()


def make_engine(case: Case, world: World) -> Engine:
    spec = EngineSpec(
        stage=case.stage,
        precision=case.precision,
        offload=case.offload,
        max_grad_norm=case.max_grad_norm,
        extra=NO_PERSISTENCE if case.stage else {},
    )
    return Engine(make_module(case), case.optimizer, spec, world)


def pack(lengths: list[int], seed: int, targets: int | None = None) -> Batch:
    """One packed row; with `targets`, only its first few supervised positions stay."""
    row = random_row(lengths, seed=seed)
    if targets is not None:
        row.targets[(row.targets != IGNORED).nonzero().squeeze(1)[targets:]] = IGNORED
    index = supervised_positions(row.targets)
    return Batch(**row.fields(), weights=None, lengths=tuple(lengths), index=index, row_ids=[])


def mixed_packs() -> list[Batch]:
    """As the loader makes them: plain, weighted, a single target, none."""
    draw = np.random.default_rng(0)

    def documents(lengths: list[int], weight: float = 1.0) -> Batch:
        rows = [draw.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]
        return pack_documents(
            [Document(row, np.full(len(row), weight, np.float32), n % 2, f"r{n}") for n, row in enumerate(rows)]
        )

    return [documents([7, 20, 5]), documents([9, 12], weight=0.5), documents([2]), empty_pack()]


def step_of(packs: list[Batch]) -> Step:
    """The step of one rank that holds all of the packs."""
    total = sum(supervised_weight(batch) for batch in packs)
    after = LoaderState(0, WindowState.start(2), "")
    return Step(0, packs, total, [], "", {}, 0, total, 0, 1.0, 1.0, 1.0, after)


def packs_of(step: int, count: int = 8) -> list[Batch]:
    """The packs of a step: every second one has at most one supervised token, so half of the ranks have almost none."""
    return [pack([7, 20, 5 + i], seed=100 * step + i, targets=None if i % 2 == 0 else i % 4 // 2) for i in range(count)]


def denominator(packs: Sequence[Batch]) -> float:
    return float(sum(int((batch.targets != IGNORED).sum()) for batch in packs))


def exact_scale(batch: Batch, mine: Sequence[Batch], total: float, world_size: int) -> float:
    return world_size / total


def train_step(
    engine: Engine, world: World, packs: list[Batch], lr: float, scale: Scale = exact_scale
) -> tuple[float, StepOutcome]:
    """One optimizer step over the packs, dealt round-robin; the global mean loss and the outcome."""
    total = denominator(packs)
    mine = packs[world.rank :: world.size]
    loss = torch.zeros((), dtype=torch.float64)
    for index, batch in enumerate(mine):
        factor = scale(batch, mine, total, world.size)
        loss += engine.forward_backward(batch, scale=factor, last=index == len(mine) - 1).sum.double().cpu()
    outcome = engine.step(lr)
    return float(world.all_reduce_sum(loss)) / total, outcome


Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]  # arrays pass between processes by value


def weights_of(engine: Engine) -> Weights:
    """Every parameter, gathered."""
    return {name: value.detach().cpu().numpy().copy() for name, value in engine.parameters()}


@dataclass(frozen=True)
class Run:
    losses: list[float]
    norms: list[float]
    weights: Weights


def train_case(world: World, case: Case, scale: Scale = exact_scale) -> Run:
    """Train a case; packs per step: 8, then 4, then 8, so that the number of micro-batches changes."""
    engine = make_engine(case, world)
    losses, norms = [], []
    for step, lr in enumerate(case.lrs):
        loss, outcome = train_step(engine, world, packs_of(step, 4 if step == 1 else 8), lr, scale)
        losses.append(loss)
        norms.append(outcome.grad_norm)
    run = Run(losses, norms, weights_of(engine))
    engine.close()
    return run


def reference_run(case: Case) -> Run:
    """The same steps in a plain loop of one process: one sum over all packs, autograd, torch's own optimizer."""
    module = make_module(case)
    named = dict(module.named_parameters())
    optimizer = case.optimizer.build((p, p.ndim >= 2 and "embed" not in name) for name, p in named.items())
    losses, norms = [], []
    for step, lr in enumerate(case.lrs):
        packs = packs_of(step, 4 if step == 1 else 8)
        loss = sum(module(**batch.inputs()).sum for batch in packs) / denominator(packs)
        loss.backward()
        gradients = [p.grad for p in named.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
        if case.max_grad_norm and norm > case.max_grad_norm:
            torch._foreach_mul_(gradients, case.max_grad_norm / float(norm))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    return Run(losses, norms, weights_in(module))


def weights_in(module: LossModel) -> Weights:
    """Every parameter of a module outside any engine, under the names that an engine uses."""
    return {name.removeprefix("model."): whole(p).numpy().copy() for name, p in module.named_parameters()}


def flat(weights: Weights) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([weights[name].ravel().astype(np.float64) for name in sorted(weights)])


def distance(weights: Weights, expected: Weights) -> float:
    """Norm of the difference over the norm of what is expected; the names must be the same."""
    assert sorted(weights) == sorted(expected)
    return float(np.linalg.norm(flat(weights) - flat(expected)) / np.linalg.norm(flat(expected)))
