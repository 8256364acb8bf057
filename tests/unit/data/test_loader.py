"""Batches: shifted targets, restarted positions, weights, empty packs; the thread, its errors and its state."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from sftdist.core.errors import DataError
from sftdist.core.settings import Method, TuneSettings
from sftdist.data.loader import (
    IGNORED,
    Document,
    Loader,
    empty_pack,
    pack_documents,
    rows_digest,
    supervised_weight,
)
from sftdist.data.plan import Plan
from sftdist.model.cost import train_flops
from sftdist.training.planned_model import cost_model
from tests.models import shape
from tests.unit.data.planning import SPEC, MemoryStore, plan, table

SOURCES = [table("a", 200, 0.6), table("b", 150, 0.4, seed=1)]
STORES = [MemoryStore(source) for source in SOURCES]


def document(ids: list[int], weights: list[float], source: int = 0, scale: float = 1.0) -> Document:
    return Document(np.array(ids, np.int32), np.array(weights, np.float32), source, f"d{ids[0]}", scale)


def test_three_documents_literally() -> None:
    """S5, S9: lengths 1, 2 and 5 with masked prompts; the shift never crosses a boundary."""
    batch = pack_documents(
        [document([9], [1]), document([4, 5], [1, 1], 1), document([1, 2, 3, 6, 7], [0, 0, 0, 1, 1])]
    )
    assert batch.ids.tolist() == [9, 4, 5, 1, 2, 3, 6, 7]
    assert batch.targets.tolist() == [IGNORED, 5, IGNORED, IGNORED, IGNORED, 6, 7, IGNORED]
    assert batch.positions.tolist() == [0, 0, 1, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 8]
    assert batch.source.tolist() == [0, 1, 0]
    assert batch.lengths == (1, 2, 5)
    assert batch.index.tolist() == [1, 5, 6]
    assert batch.row_ids == ["d9", "d4", "d1"]
    assert batch.weights is None
    assert supervised_weight(batch) == 3
    wide = (batch.ids, batch.targets, batch.positions, batch.index, batch.source)
    assert all(tensor.dtype == torch.int64 for tensor in wide)
    assert batch.cu_seqlens.dtype == torch.int32


def test_weights_stand_beside_their_targets() -> None:
    batch = pack_documents([document([1, 2, 3], [0, 0.5, 1]), document([4, 5], [0, 1], scale=3.0)])
    assert batch.targets.tolist() == [2, 3, IGNORED, 5, IGNORED]
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.5, 1, 0, 3, 0]
    assert supervised_weight(batch) == 4.5


def test_an_empty_pack_weighs_nothing() -> None:
    batch = empty_pack()
    assert batch.targets.tolist() == [IGNORED]
    assert batch.cu_seqlens.tolist() == [0, 1]
    assert supervised_weight(batch) == 0
    assert (batch.lengths, batch.index.tolist(), batch.row_ids) == ((1,), [0], [])


@pytest.mark.parametrize(
    "mode", [{}, {"mix_mode": "loss"}, {"loss_weighting": "conversation"}, {"packing": False, "packs_per_step": 9}]
)
def test_the_denominator_is_the_sum_of_the_weights_of_all_ranks(mode: dict) -> None:
    whole = list(Loader(plan(SOURCES, **mode), STORES))
    assert len(whole) > 3
    for world in (1, 3, 8):
        ranks = [list(Loader(plan(SOURCES, **mode), STORES, rank=r, world_size=world)) for r in range(world)]
        for steps in zip(whole, *ranks, strict=True):
            reference, mine = steps[0], steps[1:]
            assert len({len(step.micro) for step in mine}) == 1
            assert {step.rows for step in mine} == {reference.rows}
            held = sorted(row for step in mine for batch in step.micro for row in batch.row_ids)
            assert held == sorted(reference.row_ids)
            total = sum(supervised_weight(batch) for step in mine for batch in step.micro)
            assert total == pytest.approx(reference.denominator, rel=1e-5)


def test_figures_of_a_step() -> None:
    with Loader(plan(SOURCES), STORES) as loader:
        step = loader.take()
    assert step.rows == rows_digest(step.row_ids)
    assert step.conversations == len(step.row_ids) == sum(len(batch.row_ids) for batch in step.micro)
    assert step.tokens == sum(len(batch.ids) for batch in step.micro)
    assert step.pack_fill == step.tokens / (4 * 64)
    assert step.rank_balance == 1
    assert sum(step.shares.values()) == pytest.approx(1)
    assert set(step.shares) == {"a", "b"}
    assert step.targets == step.denominator
    assert all(row.split("/")[0] in ("a", "b") for row in step.row_ids)


@pytest.mark.parametrize("tune", [TuneSettings(), TuneSettings(method=Method.lora, r=4)], ids=["full", "lora"])
def test_flops_are_those_of_the_documents_and_targets_of_the_step(tune: TuneSettings) -> None:
    """Also where the planned share of supervised tokens is far off."""
    config = AutoConfig.for_model(**shape("llama"))
    planned = Plan(SOURCES, SPEC, cost_model(config, tune, supervised_share=0.9))
    how: dict[str, Any] = {"method": tune.method.value, "r": 0 if tune.method == Method.full else tune.r}
    with Loader(planned, STORES) as loader:
        for step in islice(loader, 5):
            lengths = [length for batch in step.micro for length in batch.lengths]
            supervised = sum(int(supervised_weight(batch)) for batch in step.micro)
            assert step.flops == pytest.approx(train_flops(config.to_dict(), lengths, supervised, **how))


def test_token_weights_of_the_store_are_kept() -> None:
    half = [replace(source, targets=source.targets[:] * 0.5) for source in SOURCES]
    stores = [MemoryStore(source, weight=0.5) for source in half]
    for step in Loader(plan(half), stores):
        assert sum(supervised_weight(batch) for batch in step.micro) == pytest.approx(step.denominator)
        assert all(batch.weights is not None for batch in step.micro)


def test_truncated_rows_keep_their_first_tokens() -> None:
    long = table("long", 60, 1.0)
    cut = replace(long, lengths=np.minimum(long.lengths[:], 20), targets=kept_targets(long, 20))
    fits = cut.targets[:] > 0
    cut = replace(cut, lengths=cut.lengths[fits], targets=cut.targets[fits], rows=cut.rows[fits])
    for step in Loader(plan([cut]), [MemoryStore(long)]):
        assert all(max(batch.lengths) <= 20 for batch in step.micro)


def kept_targets(source: object, max_len: int) -> np.ndarray:
    store = MemoryStore(source)  # type: ignore[arg-type]
    return np.array([float(store.tokens(row)[1][:max_len].sum()) for row in store.table.rows.tolist()])


def test_a_store_that_is_not_the_planned_one_is_refused() -> None:
    shorter = MemoryStore(replace(SOURCES[0], lengths=SOURCES[0].lengths[:] - 1))
    with pytest.raises(DataError, match="run sftdist prepare again"):
        list(Loader(plan(SOURCES), [shorter, STORES[1]]))
    fewer = MemoryStore(replace(SOURCES[0], targets=np.maximum(SOURCES[0].targets[:] - 1, 0)))
    with pytest.raises(DataError, match="its plan says"):
        list(Loader(plan(SOURCES), [fewer, STORES[1]]))


class Stuck(MemoryStore):
    """A file system that does not answer."""

    answer = threading.Event()

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        self.answer.wait(60)
        return super().tokens(row)


def test_closing_does_not_wait_for_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that fails closes its loader first: the others have to hear of the failure."""
    monkeypatch.setattr("sftdist.data.loader.CLOSE_SECONDS", 0.2)
    loader = Loader(plan(SOURCES), [Stuck(source) for source in SOURCES])
    began = time.monotonic()
    loader.close()
    assert 0.1 < time.monotonic() - began < 5
    Stuck.answer.set()


def test_resume_from_json_gives_the_same_steps_on_any_world_size() -> None:
    whole = [step.rows for step in Loader(plan(SOURCES, epochs=2.5), STORES)]
    for taken in (1, 5, len(whole) - 1):
        with Loader(plan(SOURCES, epochs=2.5), STORES, rank=1, world_size=2) as loader:
            assert [loader.take().rows for _ in range(taken)] == whole[:taken]
            state = json.loads(json.dumps(loader.state()))
        rest = [step.rows for step in Loader(plan(SOURCES, epochs=2.5), STORES, rank=0, world_size=3, state=state)]
        assert rest == whole[taken:]


def test_steps_assembled_ahead_are_not_in_the_state() -> None:
    with Loader(plan(SOURCES), STORES, prefetch=4) as loader:
        assert loader.state()["step"] == 0
        loader.take()
        assert loader.state()["step"] == 1


class BrokenStore(MemoryStore):
    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        raise OSError("the disk is gone")


def test_errors_of_the_thread_are_raised_by_take() -> None:
    with Loader(plan(SOURCES), [BrokenStore(SOURCES[0]), STORES[1]]) as loader:
        with pytest.raises(OSError, match="the disk is gone"):
            loader.take()
        with pytest.raises(StopIteration):
            loader.take()


def test_the_end_and_an_early_close_leave_no_thread() -> None:
    made: Plan = plan(SOURCES)
    with Loader(made, STORES, prefetch=1) as loader:
        loader.take()
    with pytest.raises(StopIteration):
        loader.take()
    finished = Loader(plan(SOURCES, max_steps=2), STORES)
    assert len(list(finished)) == 2
    finished.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader" and thread.is_alive()]
