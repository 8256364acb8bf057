"""How a model could be trained on given GPUs: ZeRO stage, offload, recomputed layers; what each needs and takes.

For `plan`, which shows all, and for `auto`, which takes the fastest that fits. None of them changes what is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.core.rules import check
from sftdist.core.settings import Kernels, Method, Offload, TrainConfig
from sftdist.data.planned import pack_tokens, plan_spec
from sftdist.model import cost, timing
from sftdist.model.hardware import CPU, Cluster
from sftdist.training.build import engine_spec, memory_setup, optimizer_spec, planned_trainable
from sftdist.training.zero_config import spec_issues

STAGES = (0, 1, 2, 3)
# What `auto` chooses, cheapest last: the last is touched only where nothing fits without.
KEYS = ("zero.stage", "zero.offload", "model.activation_checkpointing", "model.recompute_layers", "model.loss_chunk")
LOSS_CHUNKS = (1024, 512)
NEAR = 0.02  # of the time: what a prediction does not tell apart
SUPERVISED = 0.5  # of the tokens, where no data says better: chat data has 20 to 70 %


@dataclass(frozen=True)
class Choice:
    """One way to train. `parts`: bytes per GPU; `needed`: their sum with the allowances, bytes; `host`: bytes per GPU
    in its host's memory, for what is offloaded; `terms`: of a step."""

    cfg: TrainConfig
    layers: int
    parts: Mapping[str, float]
    needed: float
    host: float
    terms: timing.Terms
    fits: bool

    @property
    def recomputed(self) -> int:
        """Layers that go forward twice."""
        return recomputed_layers(self.cfg, self.layers)

    def is_like(self, other: Choice) -> bool:
        """The same engine, layers and chunk, however they are written down."""
        mine, its = self.cfg, other.cfg
        same = self.recomputed == other.recomputed and mine.model.loss_chunk == its.model.loss_chunk
        return same and mine.zero == its.zero and mine.tune.method == its.tune.method

    def words(self) -> list[str]:
        """The overrides that stand for this choice, every key of it."""
        return words_of(self.cfg)


def words_of(cfg: TrainConfig) -> list[str]:
    """The overrides that set every key of KEYS as it is here."""
    model, zero = cfg.model, cfg.zero
    count = "null" if model.recompute_layers is None else str(model.recompute_layers)
    values = (zero.stage, zero.offload, str(model.activation_checkpointing).lower(), count, model.loss_chunk)
    return [f"{key}={value}" for key, value in zip(KEYS, values, strict=True)]


def choices(
    cfg: TrainConfig,
    shape: Mapping[str, Any],
    cluster: Cluster,
    step: timing.Step,
    budget: float,
    kept: Collection[str] = (),
    *,
    offload: bool = True,
) -> list[Choice]:
    """Every ZeRO stage, offload and number of recomputed layers that can be configured: none of the layers, the fewest
    that fit (half of them where that is no question), all. `budget`: bytes per GPU; `kept`: keys that stay as they
    are; `offload=False` where the host's memory is the same."""
    layers = cost.shape_of(shape).layers
    found = []
    for variant in _engines(cfg, kept, offload):
        counts = _layer_counts(cfg, kept, layers)

        def at(count: int, variant: TrainConfig = variant) -> Choice:
            return choice(recomputing(variant, count, layers), shape, cluster, step, budget)

        ends = [at(count) for count in counts]
        if len(ends) == 2:
            low, high = counts
            if not ends[0].fits and ends[1].fits:
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (low, middle) if at(middle).fits else (middle, high)
            else:
                high = layers // 2
            some = "model.recompute_layers" not in kept
            ends[1:1] = [at(high)] if some and counts[0] < high < counts[1] else []
        found += ends
    return found


def fastest(found: Sequence[Choice]) -> Choice | None:
    """The fastest of those that fit; of those about as fast the plainest. None where nothing fits."""
    fitting = [one for one in found if one.fits]
    least = min((one.terms.total for one in fitting), default=0.0)
    near = [one for one in fitting if one.terms.total <= (1 + NEAR) * least]
    return min(near, key=lambda one: (one.cfg.zero.stage, one.terms.total), default=None)


def fastest_that_fits(
    cfg: TrainConfig,
    shape: Mapping[str, Any],
    cluster: Cluster,
    step: timing.Step,
    budget: float,
    kept: Collection[str] = (),
    *,
    offload: bool = True,
) -> Choice | None:
    """Among all choices, then with fewer logits at a time."""
    best = fastest(choices(cfg, shape, cluster, step, budget, kept, offload=offload))
    smaller = [] if "model.loss_chunk" in kept else [chunk for chunk in LOSS_CHUNKS if chunk < cfg.model.loss_chunk]
    for chunk in smaller:
        if best is None:
            changed = replace(cfg, model=replace(cfg.model, loss_chunk=chunk))
            best = fastest(choices(changed, shape, cluster, step, budget, kept, offload=offload))
    return best


def choice(cfg: TrainConfig, shape: Mapping[str, Any], cluster: Cluster, step: timing.Step, budget: float) -> Choice:
    """What a configuration needs and takes as it is."""
    layers = cost.shape_of(shape).layers
    trainable = planned_trainable(cfg, shape)
    device = "cpu" if cluster.gpu is CPU else "cuda"
    setup = memory_setup(cfg, stage=cfg.zero.stage, world=cluster.gpus, trainable=trainable, device=device)
    parts = cost.memory(shape, setup)
    needed = cost.total(parts)
    work = timing.Work(
        stage=cfg.zero.stage,
        offload=cfg.zero.offload != Offload.none,
        method=cfg.tune.method.value,
        trainable=trainable,
        quantised=cfg.tune.method == Method.qlora,
        recomputed=recomputed_layers(cfg, layers),
        precision=cfg.precision.value,
        moments=len(optimizer_spec(cfg).moments),
        fused=cfg.model.compile or cfg.model.kernels == Kernels.liger,
    )
    terms = timing.step_seconds(shape, work, step, cluster)
    host = cost.host_bytes(shape, setup)
    return Choice(cfg, layers, parts, needed, host, terms, needed <= budget and host <= cluster.host_memory)


def require_shape(cfg: TrainConfig, shape: Mapping[str, Any]) -> None:
    """Raises ConfigError for what the model's shape does not allow, which a plan would otherwise call fitting."""
    sizes, count = cost.shape_of(shape), cfg.model.recompute_layers
    issues = []
    if count is not None and count > sizes.layers:
        issues.append(
            f"model.recompute_layers: given {count}, required at most {sizes.layers}, the layers of this model"
        )
    if cfg.tune.method == Method.qlora and sizes.experts:
        issues.append(
            "tune.method: given qlora, required full or lora for a mixture of experts: bitsandbytes has no 4 bits for "
            "fused experts"
        )
    if issues:
        raise ConfigError(issues)


def proposals(
    cfg: TrainConfig,
    shape: Mapping[str, Any],
    cluster: Cluster,
    step: timing.Step,
    budget: float,
    *,
    offload: bool = True,
) -> Iterator[Choice]:
    """LoRA and QLoRA as they would fit, where more is trained now."""
    methods = (Method.full, Method.lora, Method.qlora)
    for method in methods[methods.index(cfg.tune.method) + 1 :]:
        if method == Method.qlora and cost.shape_of(shape).expert_layers:
            continue  # bitsandbytes cannot hold fused experts
        adapted = replace(cfg, tune=replace(cfg.tune, method=method))
        if (best := fastest_that_fits(adapted, shape, cluster, step, budget, offload=offload)) is not None:
            yield best


def proposed(one: Choice) -> str:
    """A proposal with its figures."""
    need = f"{one.needed / cost.GIB:.1f} GiB a GPU, {one.terms.total:.3g} s a step"
    return f"{' '.join([f'tune.method={one.cfg.tune.method}', *one.words()])}  ({need})"


def typical_step(cfg: TrainConfig, shape: Mapping[str, Any]) -> timing.Step:
    """Full packs of conversations of `data.max_len` tokens, half of them supervised: a step without data."""
    spec, length = plan_spec(cfg), cfg.data.max_len
    packs = spec.packs_per_step or -(-(spec.conversations_per_step or 1) * length // spec.pack_tokens)
    tokens = pack_tokens(cfg) // length * length if cfg.train.packing else length
    return timing.full_packs(shape, packs, tokens, length, SUPERVISED)


def recomputed_layers(cfg: TrainConfig, layers: int) -> int:
    if not cfg.model.activation_checkpointing:
        return 0
    return layers if cfg.model.recompute_layers is None else min(layers, cfg.model.recompute_layers)


def recomputing(cfg: TrainConfig, count: int, layers: int) -> TrainConfig:
    """The configuration with so many layers recomputed."""
    some = count if 0 < count < layers else None
    return replace(cfg, model=replace(cfg.model, activation_checkpointing=count > 0, recompute_layers=some))


def _engines(cfg: TrainConfig, kept: Collection[str], offload: bool) -> Iterator[TrainConfig]:
    """The configuration with each stage and offload that the rules allow beside all else."""
    stages = (cfg.zero.stage,) if "zero.stage" in kept else STAGES
    places = (cfg.zero.offload,) if "zero.offload" in kept else tuple(Offload) if offload else (Offload.none,)
    before = set(check(cfg, complete=False))
    for stage in stages:
        for place in places:
            variant = replace(cfg, zero=replace(cfg.zero, stage=stage, offload=place))
            if not set(check(variant, complete=False)) - before and not spec_issues(engine_spec(variant)):
                yield variant


def _layer_counts(cfg: TrainConfig, kept: Collection[str], layers: int) -> tuple[int, ...]:
    """The one number of recomputed layers that is asked for, or the fewest and the most that may be chosen."""
    now = recomputed_layers(cfg, layers)
    if "model.activation_checkpointing" in kept and not cfg.model.activation_checkpointing:
        return (0,)
    if "model.recompute_layers" in kept and cfg.model.recompute_layers is not None:
        return (now,)
    if {"model.activation_checkpointing", "model.recompute_layers"} <= set(kept):
        return (now,)
    if "model.recompute_layers" in kept:
        return (0, layers)
    return (1 if "model.activation_checkpointing" in kept else 0, layers)
