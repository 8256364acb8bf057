"""A26: the DeepSpeed configuration is generated; what the trainer owns cannot be overridden."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from sftdist.core.errors import ConfigError
from sftdist.training import zero_config
from sftdist.training.zero_config import OWNED, OWNED_ZERO, EngineSpec, deepspeed_config


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_generated_config_passes_deepspeeds_own_validation(stage: int, precision: str) -> None:
    """DeepSpeed asks the process group for the world size, which is 1 here; X3 runs the configs of 2 and 4 ranks."""
    parsed = DeepSpeedConfig(deepspeed_config(EngineSpec(stage, precision, "optimizer", 1.0), 1))
    assert parsed.gradient_accumulation_steps == 1
    assert int(parsed.zero_optimization_stage) == stage
    assert parsed.gradient_clipping == 1.0


@pytest.mark.parametrize("world_size", range(1, 9))
def test_batch_numbers_agree_for_every_world_size(world_size: int) -> None:
    config = deepspeed_config(EngineSpec(2, "bf16"), world_size)
    per_rank = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == per_rank * world_size


@pytest.mark.parametrize("key", list(OWNED))
def test_an_owned_key_is_refused_by_name_with_what_to_use(key: str) -> None:
    with pytest.raises(ConfigError, match=f"zero.deepspeed.{key}: .* use {OWNED[key][:10]}"):
        deepspeed_config(EngineSpec(2, "bf16", extra={key: 1}), 2)


@pytest.mark.parametrize("key", list(OWNED_ZERO))
def test_an_owned_key_inside_zero_optimization_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"zero_optimization.{key}"):
        deepspeed_config(EngineSpec(2, "bf16", extra={"zero_optimization": {key: 1}}), 2)


def test_all_issues_come_at_once() -> None:
    extra: dict[str, Any] = {"train_batch_size": 8, "zero_optimisation": {}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError) as raised:
        deepspeed_config(EngineSpec(4, "fp8", "disk", extra=extra), 2)
    assert len(raised.value.issues) == 6


def test_further_keys_are_passed_on() -> None:
    extra = {"zero_optimization": {"reduce_bucket_size": 1000}, "communication_data_type": "bf16"}
    config = deepspeed_config(EngineSpec(2, "bf16", extra=extra), 2)
    assert config["zero_optimization"] == {"reduce_bucket_size": 1000, "overlap_comm": True, "stage": 2}
    assert config["communication_data_type"] == "bf16"
    assert extra["zero_optimization"] == {"reduce_bucket_size": 1000}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_sums_and_sends_float32(precision: str) -> None:
    config = deepspeed_config(EngineSpec(1, precision), 2)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"


def test_stage_0_takes_no_deepspeed_key_and_no_offload() -> None:
    issues = zero_config.spec_issues(EngineSpec(0, "fp32", "optimizer", extra={"aio": {}}))
    assert any("zero.offload" in issue for issue in issues)
    assert any("zero.deepspeed" in issue for issue in issues)
