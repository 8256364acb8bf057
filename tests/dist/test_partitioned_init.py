"""A model that is partitioned while it is loaded (ZeRO 3) trains as one that was loaded whole (A13, A3)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdist.core.distributed import World
from sftdist.model.config import load_config
from sftdist.model.load import begin_rows, load_model, token_matrices
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import LossModel
from sftdist.training.engine import Engine, gathered, partitioned_init
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


def begun(world: World, folder: str) -> list[Any]:
    """The whole token matrices of a partitioned model, two rows of a padded vocabulary begun anew."""
    spec = EngineSpec(3, "fp32", max_grad_norm=1.0, extra=NO_PERSISTENCE)
    inside = partitioned_init(spec, world)
    config = load_config(folder, None, None)
    model = load_model(config=config, path=folder, attention="sdpa", partitioned_init=inside)
    begin_rows(model, [100, 101], partial(gathered, modifier=0))
    found = []
    for matrix in token_matrices(model):
        with gathered(matrix):
            found.append(matrix.detach().tolist())
    return found


def test_new_rows_begin_alike_on_partitions_and_on_whole_weights(tmp_path: Path) -> None:
    """A14: nothing is resized, and just these two rows change, on every rank."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    begin_rows(model, [100, 101], nullcontext)
    for of_a_rank in run_ranks(begun, 2, str(tmp_path)):
        for matrix, whole in zip(of_a_rank, token_matrices(model), strict=True):
            torch.testing.assert_close(torch.tensor(matrix), whole.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("precision", "adapted"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_partitioned_loading_changes_nothing(tmp_path: Path, precision: str, adapted: bool) -> None:
    tiny_model("llama_tied").save_pretrained(tmp_path)
    partitioned, whole, was_empty = run_ranks(two_ways, 2, str(tmp_path), precision, adapted)[0]
    assert was_empty
    assert distance(partitioned, whole) == 0.0
