"""A26: the DeepSpeed configuration is generated; what the trainer owns cannot be overridden."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from sftdist import train
from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError
from sftdist.training import zero_config
from sftdist.training.zero_config import OWNED, OWNED_ZERO, EngineSpec, deepspeed_config
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Ranks:
    """What DeepSpeed asks for the world size, where it is not the process group."""

    count: int

    def get_data_parallel_world_size(self) -> int:
        return self.count


def validate(world: World) -> int:
    """DeepSpeed's own validation of every configuration that we may make; the number of them."""
    # Without a process group DeepSpeed takes any world size for 1; the op, which the engine leaves out, too, would be
    # compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    every = list(itertools.product((1, 2, 3), ("fp32", "bf16", "fp16"), range(1, 9)))
    for stage, precision, size in every:
        made = deepspeed_config(EngineSpec(stage, precision, "optimizer", 1.0), size)
        parsed = DeepSpeedConfig(json.loads(json.dumps(made)), mpu=Ranks(size))
        assert parsed.world_size == size
        assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (size, 1)
        assert parsed.gradient_accumulation_steps == 1
        assert int(parsed.zero_optimization_stage) == stage
        assert parsed.gradient_clipping == 1.0
    for key, value in (("train_batch_size", 3), ("gradient_accumulation_steps", 2)):
        with pytest.raises(AssertionError, match="train_batch_size is not equal"):
            DeepSpeedConfig({**made, key: value}, mpu=Ranks(8))
    return len(every)


def test_generated_configs_pass_deepspeeds_own_validation() -> None:
    """On any number of ranks; batch numbers of a user's own, that do not agree, do not pass it."""
    assert run_ranks(validate, 1) == [72]


def test_an_owned_key_ends_the_command_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    words = ["+exp=quickstart", "zero.deepspeed={train_batch_size:8,zero_optimization:{stage:3}}", "optimizer.lr=0"]
    monkeypatch.setattr("sys.argv", ["sftdist train", *words])
    assert train.main() == 2
    said = capsys.readouterr().err
    assert "zero.deepspeed.train_batch_size: this key is set by the trainer; use train.packs_per_step" in said
    assert "zero.deepspeed.zero_optimization.stage: this key is set by the trainer; use zero.stage" in said
    assert "optimizer.lr: given 0" in said
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(("trainable", "elements"), [(70_000, 70_000), (8_030_261_248, 2**25), (0, 1)])
def test_buckets_follow_the_model_and_not_deepspeeds_two_gigabytes(trainable: int, elements: int) -> None:
    config = deepspeed_config(EngineSpec(2, "bf16"), 2, trainable)
    assert config["zero_optimization"]["reduce_bucket_size"] == elements
    asked = EngineSpec(2, "bf16", extra={"zero_optimization": {"reduce_bucket_size": 1000}})
    assert deepspeed_config(asked, 2, trainable)["zero_optimization"]["reduce_bucket_size"] == 1000


def test_what_is_offloaded_from_a_gpu_is_pinned() -> None:
    for pinned in (False, True):
        config = deepspeed_config(EngineSpec(2, "bf16", "optimizer"), 2, pinned=pinned)
        assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": pinned}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_sums_and_sends_float32(precision: str) -> None:
    config = deepspeed_config(EngineSpec(1, precision), 2)
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"


def test_stage_0_takes_no_deepspeed_key_and_no_offload() -> None:
    issues = zero_config.spec_issues(EngineSpec(0, "fp32", "optimizer", extra={"aio": {}}))
    assert any("zero.offload" in issue for issue in issues)
    assert any("zero.deepspeed" in issue for issue in issues)
