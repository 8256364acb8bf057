"""A model that is partitioned while it is loaded (ZeRO 3) trains as one that was loaded whole (A13, A3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.model.config import load_config
from sftdist.model.load import load_model
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import LossModel
from sftdist.training.engine import Engine, partitioned_init
from sftdist.training.zero_config import EngineSpec
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.training_cases import ADAMW, NO_PERSISTENCE, Weights, distance, packs_of, train_step, weights_of


def two_ways(world: World, folder: str, precision: str, adapted: bool) -> tuple[Weights, Weights, bool]:
    """Two steps of the model in `folder`, loaded inside the context and whole; was it empty before the engine?"""
    spec = EngineSpec(3, precision, max_grad_norm=1.0, extra=NO_PERSISTENCE)
    runs, empty = [], []
    for inside in (partitioned_init(spec, world), partitioned_init(replace(spec, stage=2), world)):
        config = load_config(folder, None, None)
        model: Any = load_model(config=config, path=folder, attention="sdpa", partitioned_init=inside)
        empty.append(all(parameter.numel() == 0 for parameter in model.parameters()))
        if adapted:
            torch.manual_seed(1)
            model, _ = attach(model, LoraSpec(r=4))
        engine = Engine(LossModel(model, 2, 16), ADAMW, spec, world)
        for step in range(2):
            train_step(engine, world, packs_of(step), 1e-3)
        runs.append(weights_of(engine))
        engine.close()
    return runs[0], runs[1], empty == [True, False]


@pytest.mark.parametrize(("precision", "adapted"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_partitioned_loading_changes_nothing(tmp_path: Path, precision: str, adapted: bool) -> None:
    tiny_model("llama_tied").save_pretrained(tmp_path)
    partitioned, whole, was_empty = run_ranks(two_ways, 2, str(tmp_path), precision, adapted)[0]
    assert was_empty
    assert distance(partitioned, whole) == 0.0
