"""Out of memory: what takes it, part by part, and overrides that really fit, by the planner's own figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sftdist.core import config
from sftdist.core.distributed import World
from sftdist.core.rules import check
from sftdist.core.settings import TrainConfig
from sftdist.core.snapshot import config_hash
from sftdist.model import cost
from sftdist.model.hardware import GPUS, Cluster
from sftdist.training import shortage
from sftdist.training.choices import choice, typical_step
from sftdist.training.shortage import OutOfMemory, reason_of, shortage_explained, ways_out

LLAMA_8B: dict[str, Any] = {
    **{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False},
}
EIGHT = Cluster(GPUS["H100"], 8, host_memory=200 * 2.0**30)
WORDS = ("model.path=model", "data.train=my.jsonl", "data.max_len=4096", "train.packs_per_step=16")


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight H100, as the planner sees them."""
    monkeypatch.setattr(shortage, "this_machine", lambda cfg: (EIGHT, 80 * 2.0**30))


def configured(*words: str, exp: str = "full") -> TrainConfig:
    return config.compose(exp, [*WORDS, *words])


def overridden(cfg: TrainConfig, words: tuple[str, ...]) -> TrainConfig:
    """The configuration with the words set, through the same schema as a command line."""
    given = dict(word.split("=") for word in words)
    for key, text in given.items():
        section, name = key.split(".")
        kind = type(getattr(getattr(cfg, section), name))
        value: Any = {"null": None, "true": True, "false": False}.get(text, text)
        if isinstance(value, str):
            value = int(value) if value.isdigit() else kind(value)
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


def needed(cfg: TrainConfig) -> float:
    return choice(cfg, LLAMA_8B, EIGHT, typical_step(cfg, LLAMA_8B), 1e15).needed


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("gib", [100, 60, 40, 24, 12])
def test_each_way_fits_and_is_a_configuration(gib: int) -> None:
    cfg = configured("zero.stage=0", "train.pack_tokens=8192")
    assert needed(cfg) > gib * cost.GIB
    ways = ways_out(cfg, LLAMA_8B, gib * cost.GIB)
    assert 1 <= len(ways) <= 3
    for way in ways:
        changed = overridden(cfg, way.words)
        assert needed(changed) == pytest.approx(way.needed)
        assert way.needed <= gib * cost.GIB
        assert check(changed, complete=False) == []
        assert (config_hash(changed) == config_hash(cfg)) == way.same_run, way


@pytest.mark.usefixtures("eight")
def test_the_cheapest_that_changes_nothing_comes_first() -> None:
    cfg = configured("zero.stage=0", "train.pack_tokens=8192", "model.activation_checkpointing=false")
    ways = ways_out(cfg, LLAMA_8B, 60 * cost.GIB)
    assert ways[0].same_run
    same = [way for way in ways if way.same_run]
    assert same == sorted(same, key=lambda way: way.seconds)
    assert ways == [*same, *(way for way in ways if not way.same_run)]
    keys = [way.keys for way in ways]
    assert all(not one <= other for n, one in enumerate(keys) for other in keys[n + 1 :]), "none only adds keys"


@pytest.mark.usefixtures("eight")
def test_where_nothing_else_fits_adapters_are_proposed_and_then_nothing() -> None:
    cfg = configured("zero.stage=3")
    few = replace(cfg, zero=replace(cfg.zero, stage=0))

    def proposed(gib: float) -> list[str]:
        return [way.words[0] for way in ways_out(few, LLAMA_8B, gib * cost.GIB)]

    assert proposed(12) == ["tune.method=lora", "tune.method=qlora"]
    assert proposed(8) == ["tune.method=qlora"]
    assert shortage.ways_lines(ways_out(few, LLAMA_8B, 2 * cost.GIB)) == [
        "No override is known that would fit: use more ranks, or GPUs with more memory."
    ]


def test_a_step_of_shorter_packs_has_the_same_tokens() -> None:
    cfg = configured("train.pack_tokens=12288")
    (shorter,) = (one for one in shortage._smaller(cfg) if one.train.pack_tokens == 4096)
    assert shorter.train.packs_per_step == 48
    assert [one.train.pack_tokens for one in shortage._smaller(configured())] == [None, None]  # no shorter pack


def test_what_proved_too_low_is_aimed_below() -> None:
    parts = {"weights": 50.0 * cost.GIB, "context": 0.0}
    whole = cost.total(parts)
    assert shortage.aim(parts, 80 * cost.GIB, None) == pytest.approx(0.8 * whole)
    assert shortage.aim(parts, 80 * cost.GIB, 2 * whole) == pytest.approx(40 * cost.GIB)
    assert shortage.aim(parts, 30 * cost.GIB, None) == 30 * cost.GIB


def test_parts_by_size_with_what_they_sum_to() -> None:
    parts = {"weights": 2 * cost.GIB, "optimizer": 8 * cost.GIB, "buckets": 0.0, "context": 1 * cost.GIB}
    said = shortage.by_part(parts)
    assert said == "optimizer 8, weights 2, context 1, allowance for fragments 1"
    assert sum(float(part.split()[-1]) for part in said.split(", ")) == pytest.approx(cost.total(parts) / cost.GIB)


def test_the_line_that_says_what_could_not_be_had() -> None:
    with pytest.raises(RuntimeError) as huge:
        torch.empty(2**50, dtype=torch.uint8)
    assert "you tried to allocate 1125899906842624 bytes" in reason_of(huge.value)
    assert reason_of(MemoryError()) == "MemoryError"
    assert reason_of(RuntimeError("\n\nCUDA error: out of memory\nFor debugging")) == "CUDA error: out of memory"


def test_other_errors_pass(tmp_path: Any) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shapes") as other, shortage_explained(configured(), world):
        raise RuntimeError("shapes do not match")
    assert not isinstance(other.value, OutOfMemory)
