"""What the step's benchmarks count: the matrix products of a step, the kinds of work in a profile, the end of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.profile_step import STEP, kind_of
from benchmarks.start import of_the_end
from benchmarks.step import PEERS, PeerSetting
from benchmarks.training import Trainer, products_of
from sftdist.data.loader import Document, pack_documents
from sftdist.model.cost import dense_flops, head_flops
from sftdist.model.loss import LossModel
from tests.models import tiny_model

LENGTHS = (40, 25, 9)


@pytest.fixture
def module() -> LossModel:
    return LossModel(tiny_model("llama", attention="sdpa"), num_sources=1, chunk=16)


def trainer_of(module: LossModel) -> Trainer:
    """As far as its products go."""

    class Engine:
        pass

    engine = cast(Any, Engine())
    engine.module = module
    return Trainer(engine, cast(Any, None), cast(Any, None), {}, torch.float32, loss_chunk=16)


def test_the_products_are_all_dense_flops_of_a_step(module: LossModel) -> None:
    """Forward and twice backward of every linear layer; the head sees supervised positions, 16 at a time."""
    shape = cast(Any, module.model).config.to_dict()
    packs = [(74, 40), (70, 16), (10, 0)]
    products = products_of(trainer_of(module), packs)
    flops = sum(count * 6.0 * rows * inputs * outputs for (rows, inputs, outputs), count in products.items())
    tokens, supervised = (sum(column) for column in zip(*packs, strict=True))
    assert flops == 3 * (dense_flops(shape) * tokens + head_flops(shape) * supervised)
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    assert {rows: products[rows, hidden, vocabulary] for rows in (16, 8)} == {16: 3, 8: 1}


def test_a_profile_tells_attention_loss_and_products_apart_in_both_directions(module: LossModel) -> None:
    rows = torch.randint(0, 100, (sum(LENGTHS),), dtype=torch.int32).numpy()
    parts = (rows[:40], rows[40:65], rows[65:])
    batch = pack_documents([Document(ids, torch.ones(len(ids)).numpy(), 0, "") for ids in parts])
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled, record_function(STEP):
        module(**batch.inputs()).sum.backward()
    found: dict[str, set[str]] = {}
    for event in profiled.events():
        found.setdefault(kind_of(event), set()).add(event.name)
    assert {"_ShortAttention", "_ShortAttentionBackward", "aten::bmm"} <= found["attention"]
    assert {"_FusedHead", "aten::_log_softmax", "aten::mm"} <= found["loss and head"]
    assert "aten::mm" in found["matrix products of the layers"]
    assert not {"aten::bmm", "aten::baddbmm"} & found["matrix products of the layers"], "attention's own products"
    assert found["Python and hooks"] == {STEP}


def test_the_end_of_a_run_is_read_from_its_files(tmp_path: Path) -> None:
    """Three seconds from the checkpoint to the written export, two for its check; the last step took one more."""
    (tmp_path / "export").mkdir()
    at = {"metrics.jsonl": 100.0, "LATEST": 100.5, "export/manifest.json": 103.5, "status.json": 105.5}
    for name, moment in at.items():
        (tmp_path / name).write_text(json.dumps({"state": "done"}))
        os.utime(tmp_path / name, (moment, moment))
    found = of_the_end(tmp_path, [9.0, 2.0, 2.0, 2.1, 3.0])  # the first step is no usual one
    assert found == {
        "last checkpoint": 0.5,
        "export itself": 3.0,
        "export with its check": 5.0,
        "the last step is longer by": 1.0,
        "export, check and longer step": 6.0,
        "last step to done": 5.5,
    }


def test_every_setting_of_the_peer_is_another_one() -> None:
    settings = [PeerSetting.of(word) for word in PEERS.split(",")]
    assert len(set(settings)) == len(settings) == len({str(setting) for setting in settings})
    assert {(one.processes, one.layout) for one in settings} == {
        (p, layout) for p in (1, 2) for layout in ("packed", "padded")
    }
    assert {one.dtype for one in settings} == {"bf16_weights", "bf16_autocast", "fp32"}
