"""The DeepSpeed configuration: generated from typed values, never written by users."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from sftdist.core.errors import ConfigError
from sftdist.model.buckets import reduce_bucket

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EngineSpec:
    """How to train: ZeRO stage 0-3, precision fp32 | bf16 | fp16, offload none | optimizer, the clipping norm (0: no
    clipping), and further DeepSpeed keys (`zero.deepspeed`)."""

    stage: int
    precision: str
    offload: str = "none"
    max_grad_norm: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


# Top-level keys that this project decides, each with the key to use instead.
OWNED = {
    "train_batch_size": "train.packs_per_step, train.tokens_per_step or train.conversations_per_step",
    "train_micro_batch_size_per_gpu": "train.pack_tokens",
    "gradient_accumulation_steps": "train.packs_per_step, train.tokens_per_step or train.conversations_per_step",
    "managed_gradient_accumulation": "nothing: the trainer owns gradient accumulation",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "prescale_gradients": "nothing: the loss is scaled exactly",
    "gradient_predivide_factor": "nothing: the loss is scaled exactly",
    "optimizer": "optimizer.name and its neighbours",
    "scheduler": "optimizer.schedule",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "zero.offload",
    "steps_per_print": "nothing: metrics.jsonl holds every step",
    "checkpoint": "checkpoint.every_steps and its neighbours",
    "wandb": "tracking.wandb",
    "tensorboard": "tracking.wandb",
    "csv_monitor": "tracking.wandb",
}
# The same inside zero_optimization.
OWNED_ZERO = {
    "stage": "zero.stage",
    "offload_optimizer": "zero.offload",
    "cpu_offload": "zero.offload",
    "ignore_unused_parameters": "nothing: a parameter without a gradient counts as zero on every rank",
}
# Inside zero_optimization: sizes and overlap of communication, nothing that rounds or moves what is trained.
ALLOWED_ZERO = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
# What users may add: communication, memory and profiling, nothing that changes what is trained.
ALLOWED = (
    "zero_optimization",
    "communication_data_type",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "aio",
    "dump_state",
)


def deepspeed_config(
    spec: EngineSpec, world_size: int, trainable: int | None = None, *, pinned: bool = False
) -> dict[str, Any]:
    """The configuration that `deepspeed.initialize` gets for ZeRO 1-3.

    One micro-batch is one pack, and the engine says itself when a step ends, so the batch numbers are constants.
    `trainable`: parameters, for the size of the reduction's buckets; `pinned`: what is offloaded lies in page-locked
    memory, from and to which a GPU copies at several times the rate and beside its work.
    Raises ConfigError, all issues at once, for a stage, precision or offload that does not exist or does not go
    together, and for a key in `spec.extra` that this project owns or that it does not pass on.
    """
    issues = spec_issues(spec)
    if issues:
        raise ConfigError(issues)
    extra = copy.deepcopy(spec.extra)
    zero: dict[str, Any] = extra.pop("zero_optimization", {})
    if spec.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    zero.setdefault("overlap_comm", True)
    if trainable is not None:
        zero.setdefault("reduce_bucket_size", reduce_bucket(trainable))
    config: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": {**zero, "stage": spec.stage},
        **extra,
    }
    if spec.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if spec.precision == "fp16":
        # A static scale, which the engine overrides: the dynamic one is its own, the same for every stage.
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}
    if spec.precision != "fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config.setdefault("communication_data_type", "fp32")
    return config


def spec_issues(spec: EngineSpec) -> list[str]:
    """Everything that is wrong with an engine's settings, one line each."""
    issues = []
    if spec.stage not in (0, 1, 2, 3):
        issues.append(f"zero.stage={spec.stage}: it must be 0, 1, 2 or 3")
    if spec.precision not in COMPUTE_DTYPE:
        issues.append(f"precision={spec.precision}: it must be one of {', '.join(COMPUTE_DTYPE)}")
    if spec.offload not in ("none", "optimizer"):
        issues.append(f"zero.offload={spec.offload}: it must be none or optimizer")
    if spec.stage == 0 and spec.offload != "none":
        issues.append(f"zero.offload={spec.offload} with zero.stage=0: stage 0 offloads nothing; set zero.stage=2")
    if spec.stage == 0 and spec.extra:
        issues.append("zero.deepspeed with zero.stage=0: stage 0 runs without DeepSpeed; remove the keys")
    return issues + override_issues(spec.extra)


def override_issues(extra: dict[str, Any]) -> list[str]:
    """What is wrong with the keys of `zero.deepspeed`, one line each."""
    issues = []
    for key in extra:
        if key in OWNED:
            issues.append(f"zero.deepspeed.{key}: this key is set by the trainer; use {OWNED[key]} instead")
        elif key not in ALLOWED:
            issues.append(f"zero.deepspeed.{key}: not passed on to DeepSpeed; allowed are {', '.join(ALLOWED)}")
    zero = extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*issues, f"zero.deepspeed.zero_optimization={zero!r}: it must be a mapping"]
    for key in zero:
        name = f"zero.deepspeed.zero_optimization.{key}"
        if key in OWNED_ZERO:
            issues.append(f"{name}: this key is set by the trainer; use {OWNED_ZERO[key]} instead")
        elif key not in ALLOWED_ZERO:
            issues.append(f"{name}: not passed on to DeepSpeed; allowed are {', '.join(ALLOWED_ZERO)}")
    return issues
