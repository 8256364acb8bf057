"""The engine: DeepSpeed ZeRO 1-3, and plain data parallelism, behind few verbs. The only deepspeed import.

One owner of gradient accumulation: a step has any number of micro-batches, the same on every rank, and the caller
says which is the last. The loss of a micro-batch is a sum; scaled by `world size / global denominator` it makes the
mean over ranks that every stage reduces with the exact gradient of `total sum / denominator`. DeepSpeed divides by
nothing: its accumulation count is 1, and its boundary is set for every micro-batch.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import deepspeed
import torch
import torch.distributed
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError, ConfigError, TrainingError
from sftdist.data.loader import Batch, empty_pack
from sftdist.model.backends.interface import Documents
from sftdist.model.loss import LossModel, LossOutput
from sftdist.model.quantised import is_quantised, whole
from sftdist.model.text_part import causal_lm, convolutions
from sftdist.training.optimizer import OptimizerSpec, decays, full_shape, stage_issues
from sftdist.training.own_optimizer import set_updates, without_decay
from sftdist.training.replicated import Replicated
from sftdist.training.zero_config import COMPUTE_DTYPE, EngineSpec, deepspeed_config, spec_issues


@dataclass
class LossScale:
    """The dynamic loss scale of fp16: halved on overflow, doubled after `window` good updates in a row."""

    value: float = 2.0**16
    good: int = 0
    window: int = 1000
    floor: float = 1.0

    def update(self, overflow: bool) -> None:
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.value /= 2
        elif self.good == self.window:
            self.value, self.good = self.value * 2, 0


@dataclass(frozen=True)
class StepOutcome:
    """`grad_norm`: of the reduced gradient, before clipping. `applied` is false only in fp16, after an overflow: the
    loss scale was halved, the weights are untouched, and the same micro-batches can be run again."""

    grad_norm: float
    applied: bool
    loss_scale: float


class ParameterState(NamedTuple):
    """One trainable parameter, gathered: `tensors` holds `value` and the optimizer's moments, float32."""

    name: str
    tensors: dict[str, Tensor]


class Partitioned:
    """ZeRO 1-3 through DeepSpeed. The same verbs as `Replicated`."""

    def __init__(self, module: LossModel, optimizer: OptimizerSpec, spec: EngineSpec, world: World) -> None:
        _join_deepspeed()
        self._loss_scale = 1.0
        self._linked = False
        self._rank = world.rank
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # DeepSpeed makes its masters from the weights it has cast, so the float32 values are kept for them.
        exact = {name: (_part(p), _is_partitioned(p)) for name, p in self._weights.items()}
        if spec.precision == "fp32":
            exact = {}
        elif any(_is_partitioned(p) for p in module.parameters()):
            _round_parts(module, COMPUTE_DTYPE[spec.precision])
        decay = decays(module)
        if spec.stage == 3:
            _refuse_dora(self._weights)
            for head in _head_parameters(module):
                deepspeed.zero.register_external_parameter(module.head_loss, head)
            for owner, weight in convolutions(module.model):
                deepspeed.zero.register_external_parameter(owner, weight)
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer.build((p, decay[name]) for name, p in self._weights.items()),
                config=deepspeed_config(
                    spec,
                    world.size,
                    sum(full_shape(p).numel() for p in self._weights.values()),
                    pinned=world.device.type == "cuda",
                ),
            )
        for name, (value, is_part) in exact.items():
            set_master = safe_set_local_fp32_param if is_part else self._set_master
            set_master(self._weights[name], value.to(world.device, torch.float32))

    @property
    def loss_scale(self) -> float:
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._loss_scale = value
        self._engine.optimizer.override_loss_scale(value)

    def forward(self, fields: dict[str, Any]) -> Any:
        return self._engine(**fields)

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def read(self, figures: Tensor) -> list[float]:
        return cast(list[float], figures.tolist())

    def step(self, lr: float) -> tuple[float, bool]:
        """The gradient norm before clipping (inf when it is not finite), and whether the update was applied."""
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = lr
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if applied and not self._linked:
            self._link_moments()
        norm = self._engine.get_global_grad_norm()
        return (float(norm) if applied and norm is not None else math.inf), applied

    def discard(self) -> None:
        self._engine.optimizer.zero_grad()

    def gradient(self, name: str) -> Tensor:
        return cast(Tensor, safe_get_full_grad(self._weights[name])).float() / self._loss_scale

    def _link_moments(self) -> None:
        """ZeRO 1-2 of DeepSpeed 0.19 links the moments of every parameter group to its parameters after the first
        group's first update, when the other groups have none yet; so it is done again when all have."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            for weights, master in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(weights, master, optimizer.optimizer.state)
        self._linked = True

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._weights

    def value(self, name: str) -> Tensor:
        return cast(Tensor, safe_get_full_fp32_param(self._weights[name]))

    def moment(self, name: str, key: str) -> Tensor:
        return cast(Tensor, safe_get_full_optimizer_state(self._weights[name], key))

    @torch.no_grad()
    def set_value(self, name: str, value: Tensor) -> None:
        """Set the master, and the weight that the forward uses; `value` is the same on every rank."""
        parameter = self._weights[name]
        self._set_master(parameter, value)
        with gathered(parameter, modifier=0):
            parameter.data.copy_(value)

    def set_moment(self, name: str, key: str, value: Tensor) -> None:
        parameter = self._weights[name]
        if _is_partitioned(parameter):
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        if _is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What this rank holds of a full value under ZeRO 3: parts of the same size, the last one filled up with zeros.
        DeepSpeed 0.19's own setter of full values fails where the ranks do not divide a parameter."""
        part = torch.zeros_like(_part(parameter), dtype=torch.float32)
        mine = value.flatten()[self._rank * part.numel() :][: part.numel()]
        part[: len(mine)] = mine
        return part

    @property
    def optimizer(self) -> Optimizer:
        return cast(Optimizer, self._engine.basic_optimizer)

    def frozen_value(self, parameter: nn.Parameter) -> Tensor:
        with gathered(parameter):
            return whole(parameter).clone()

    def close(self) -> None:
        self._engine.destroy()


class Engine:
    """A loss module under training. Every verb is collective: all ranks call it together."""

    def __init__(self, module: LossModel, optimizer: OptimizerSpec, spec: EngineSpec, world: World) -> None:
        issues = [*spec_issues(spec), *stage_issues(optimizer, spec.stage)]
        if issues:
            raise ConfigError(issues)
        self.module = module
        self.world = world
        self.spec = spec
        self.optimizer = optimizer
        self.updates = 0  # optimizer updates that were applied
        kind = Replicated if spec.stage == 0 else Partitioned
        self._core: Replicated | Partitioned = kind(module, optimizer, spec, world)
        self._set_scale(LossScale() if spec.precision == "fp16" else None)

    def forward_backward(self, batch: Batch, *, scale: float, last: bool) -> LossOutput:
        """Loss and gradient of one micro-batch; the gradient of `scale * sum` is added to this step's.

        `scale`: world size / denominator of the whole step. `last`: no further micro-batch comes before `step`.
        """
        fields = self._fields(batch)
        if self.spec.precision == "fp32" or not scale:
            output = self._core.forward(fields)
            self._core.backward(output.sum * scale, last)
            return LossOutput(*(tensor.detach() for tensor in output))
        # In low precision the scale, fp16's loss scale included, goes in with the weights: a loss path that makes its
        # gradient in the forward then rounds it at the same size as one that makes it in the backward, and all stages
        # take the same step. The core scales the loss itself; dividing by a power of two is exact.
        factor = scale * self._core.loss_scale
        ones = torch.ones(len(fields["targets"]), device=self.world.device)
        fields["weights"] = factor * (ones if fields["weights"] is None else fields["weights"])
        output = self._core.forward(fields)
        self._core.backward(output.sum / self._core.loss_scale, last)
        return LossOutput(*(tensor.detach() / factor for tensor in output))

    def read(self, figures: Tensor) -> list[float]:
        """The values of a device tensor [K], after the last micro-batch and before `step`. At ZeRO 0 the norm that
        `step` will check comes in the same read; the stages above leave their norms to DeepSpeed's own reads."""
        return self._core.read(figures)

    def step(self, lr: float) -> StepOutcome:
        """Update the weights at this learning rate, after the last micro-batch.

        Raises TrainingError on every rank, with the weights untouched, when the gradient is not finite; in fp16 only
        when the loss scale is at its floor.
        """
        norm, applied = self._core.step(lr)
        if not applied and (self._scale is None or self._scale.value <= self._scale.floor):
            raise TrainingError(
                f"step {self.updates + 1}: the gradient norm is {norm}, but it must be finite; no weight was changed."
            )
        self.updates += applied
        outcome = StepOutcome(grad_norm=norm, applied=applied, loss_scale=self._core.loss_scale)
        if self._scale is not None:
            self._scale.update(overflow=not applied)
            self._core.loss_scale = self._scale.value
        return outcome

    def gradient_norms(self) -> dict[str, float]:
        """The norm of each parameter's reduced gradient, before clipping; after the last micro-batch has been read, and
        before `step`."""
        return {_outer(name): float(self._core.gradient(name).norm()) for name in self._core.trainable()}

    def discard(self) -> None:
        """Forget the gradients of a step that has failed, so that its packs can run again to see why."""
        self._core.discard()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossOutput:
        """The loss without gradient, dropout off; the module is in its former mode afterwards."""
        with evaluating(self.module):
            return LossOutput(*self._core.forward(self._fields(batch)))

    def probe(self, batch: Batch) -> LossOutput:
        """A real forward and backward of `loss * 0`: the memory of a step, without a trace, in random state neither."""
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return self.forward_backward(batch, scale=0.0, last=False)

    def parameters(self, *, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name in the wrapped model and full float32 tensor, one gathered after another; a tied one comes once."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad or not trainable_only:
                yield _outer(name), self.value(_outer(name))

    def value(self, name: str) -> Tensor:
        """The full float32 value of one parameter of the wrapped model: of the master, where it is trained."""
        inner = _inner(name)
        if inner in self._core.trainable():
            return self._core.value(inner)
        return self._core.frozen_value(self.module.get_parameter(inner))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[T,V] float32 of one document [T], from the live weights in the compute dtype."""
        documents = Documents.of_lengths([len(ids)], self.world.device)
        with evaluating(self.module):
            output = self.module.model(
                input_ids=ids[None].to(self.world.device), use_cache=False, **documents.model_arguments()
            )
        return cast(Tensor, output.logits[0].float())

    def shapes(self) -> dict[str, torch.Size]:
        """The full shape of every trainable parameter, in the order of `state`; the same on every rank."""
        return {_outer(name): full_shape(parameter) for name, parameter in self._core.trainable().items()}

    def state(self) -> Iterator[ParameterState]:
        """Value and moments of each trainable parameter, gathered on every rank one after another."""
        self._ensure_moments()
        for name in self._core.trainable():
            moments = {key: self._core.moment(name, key) for key in self.optimizer.moments}
            yield ParameterState(_outer(name), {"value": self._core.value(name), **moments})

    def counters(self) -> dict[str, float]:
        """What `load_state` needs beside the tensors: the number of updates, and fp16's loss scale."""
        scale = {} if self._scale is None else {"loss_scale": self._scale.value, "good_updates": self._scale.good}
        return {"updates": self.updates, **scale}

    def load_state(self, states: Iterator[ParameterState], counters: Mapping[str, float]) -> None:
        """Put back what `state` gave, on any world size and stage; every rank gives the same tensors.

        Raises CheckpointError when names or shapes are not those of this model.
        """
        self._ensure_moments()
        missing = set(self._core.trainable())
        for name, tensors in states:
            inner = _inner(name)
            if inner not in missing or tensors["value"].shape != full_shape(self._core.trainable()[inner]):
                raise CheckpointError(
                    f"{name} {list(tensors['value'].shape)} is no trainable parameter of this model with that shape; "
                    "the checkpoint was made by another model or another tune.* setting"
                )
            missing.remove(inner)
            self._core.set_value(inner, tensors["value"].to(self.world.device))
            for key in self.optimizer.moments:
                self._core.set_moment(inner, key, tensors[key].to(self.world.device))
        if missing:
            raise CheckpointError(f"the checkpoint lacks {len(missing)} trainable parameters: {sorted(missing)[:5]}")
        self._set_updates(int(counters["updates"]))
        if self._scale is not None and "loss_scale" in counters:
            self._set_scale(LossScale(counters["loss_scale"], int(counters["good_updates"])))

    def dtypes(self) -> Mapping[str, str]:
        """What start-up prints: the dtype of the weights in the forward, of the masters and of the moments."""
        self._ensure_moments()
        name, parameter = next(iter(self._core.trainable().items()))
        moments = {key: _dtype(self._core.moment(name, key)) for key in self.optimizer.moments}
        return {"weights": _dtype(parameter), "masters": _dtype(self._core.value(name)), **moments}

    def close(self) -> None:
        """Give back what the engine holds in the process; the module is not used afterwards."""
        self._core.close()

    def _ensure_moments(self) -> None:
        """Optimizer state is made by the first update: before it, one update of `loss * 0` at rate 0 makes it."""
        moments = self.optimizer.moments
        if not moments or any(self._core.optimizer.state.values()):
            return
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.forward_backward(empty_pack(), scale=0.0, last=True)
        with without_decay(self._core.optimizer):
            self._core.step(0.0)
        self._set_updates(0)

    def _set_scale(self, scale: LossScale | None) -> None:
        self._scale = scale
        if scale is not None:
            self._core.loss_scale = scale.value

    def _set_updates(self, updates: int) -> None:
        """AdamW counts its updates for the bias correction, once per tensor."""
        self.updates = updates
        set_updates(self._core.optimizer.state.values(), updates)

    def _fields(self, batch: Batch) -> dict[str, Any]:
        return batch.to(self.world.device).inputs()


@contextmanager
def partitioned_init(spec: EngineSpec, world: World) -> Iterator[None]:
    """Inside, under ZeRO 3, transformers partitions every parameter as soon as it exists, in float32.

    The engine rounds the parts to the compute dtype itself, after it has kept their values for the masters.
    """
    if spec.stage != 3:
        yield
        return
    _join_deepspeed()
    _ignore_renamed()
    switch = HfDeepSpeedConfig(deepspeed_config(replace(spec, precision="fp32"), world.size))
    try:
        yield
    finally:
        del switch
        unset_hf_deepspeed_config()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode of every submodule after."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _part(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its part under ZeRO 3, else all of it."""
    return cast(Any, parameter).ds_tensor.data if _is_partitioned(parameter) else parameter.data


def _round_parts(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parts that this rank holds: DeepSpeed takes a partitioned module as it is."""
    for parameter in module.parameters():
        if is_quantised(parameter):
            continue
        parameter.data = parameter.data.to(dtype)
        if _is_partitioned(parameter):
            part = cast(Any, parameter).ds_tensor
            part.data = part.data.to(dtype)


def _refuse_dora(names: Iterable[str]) -> None:
    if any("lora_magnitude_vector" in name for name in names):
        raise ConfigError(
            "tune.dora=true with zero.stage=3: PEFT's DoRA reads the adapters' weights outside of their layers, where "
            "ZeRO 3 has left them empty; set zero.stage=2, or tune.dora=false"
        )


def _head_parameters(module: LossModel) -> list[nn.Parameter]:
    """What the loss uses of the LM head, outside the head's own forward."""
    head = causal_lm(module.model).get_output_embeddings()
    return list(cast(nn.Module, head).parameters(recurse=False))


def gathered(parameter: nn.Parameter, modifier: int | None = None) -> AbstractContextManager[Any]:
    """The full parameter inside; with `modifier`, that rank's value is written back to every rank's part."""
    if not _is_partitioned(parameter):
        return nullcontext()
    return cast(AbstractContextManager[Any], deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier))


def _join_deepspeed() -> None:
    """DeepSpeed over the existing process group; for one process without one, over a group of its own.

    It would compile an op for CPU inference here, which takes a minute and which training never uses.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its memory while it starts."""
    _ignore_renamed()
    with redirect_stdout(io.StringIO()):
        yield


def _ignore_renamed() -> None:
    """DeepSpeed calls functions that torch has renamed, from its first step to its last: nobody here can change it."""
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def _outer(name: str) -> str:
    """A parameter's name in the wrapped model: without the loss module's prefix."""
    return name.removeprefix("model.")


def _inner(name: str) -> str:
    return f"model.{name}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
