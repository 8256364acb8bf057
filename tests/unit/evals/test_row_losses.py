"""The loss of each row: what training calls `eval/loss`, from one row a forward, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sftdist.core.distributed import World
from sftdist.core.errors import DataError
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.sources import Source
from sftdist.data.store import LEAKED, VALIDATION, TokenStore
from sftdist.data.template import ChatTemplate
from sftdist.evals.loss import evaluate_loss
from sftdist.evals.row_losses import Row, loss_scores, name_of, require_same_tokens, row_losses, rows_to_score
from sftdist.evals.rows import evaluation_batches
from sftdist.model.loss import LossModel
from tests.e2e.workshop import SPECIALS, write_rows
from tests.models import tiny_model
from tests.ranks import run_ranks
from tests.tokenizers import byte_tokenizer

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
LONGEST = 130


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    folder = tmp_path_factory.mktemp("losses")
    entries = [
        SourceRequest(Source(name, str(write_rows(folder / f"{name}.jsonl", n)))) for name, n in (("a", 30), ("b", 9))
    ]
    request = PrepareRequest(
        sources=tuple(entries),
        store_dir=folder / "stores",
        tokenizer=byte_tokenizer(specials=SPECIALS),
        chat_template="chatml",
        validation_fraction=0.5,
        holdout_fraction=0.0,
    )
    return list(prepare(request).stores.values())


def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=len(byte_tokenizer(specials=SPECIALS)))


def losses(world: World, folders: list[Path]) -> list[tuple[float, float]]:
    """Also as a rank: stores are opened by their folder there."""
    rows = rows_to_score([TokenStore.open(folder) for folder in folders], "validation", max_len=LONGEST, most=None)
    assert len(rows) == 14
    return row_losses(model, rows[1:], world)


def test_they_sum_to_what_training_calls_the_loss(stores: list[TokenStore]) -> None:
    rows = rows_to_score(stores, "validation", max_len=LONGEST, most=None)
    scores = loss_scores(rows, row_losses(model, rows, ALONE), None)
    packed = evaluation_batches(stores, [(stores.index(row.store), row.number) for row in rows], 4 * LONGEST)
    loss_model = LossModel(model(), num_sources=2)
    with torch.inference_mode():
        truth = evaluate_loss(
            lambda b: loss_model(b.ids, b.targets, b.positions, b.cu_seqlens, b.source, weights=b.weights),
            packed,
            ALONE,
            ["a", "b"],
        )
    assert truth is not None
    assert set(scores) == {"a.loss", "b.loss", "all.loss"}
    for name, key in (("a.loss", "eval/loss/a"), ("b.loss", "eval/loss/b"), ("all.loss", "eval/loss")):
        one = scores[name]
        assert one.weights is not None
        assert np.average(one.tuned, weights=one.weights) == pytest.approx(truth[key], rel=1e-6)
        assert np.mean(one.tuned) != pytest.approx(truth[key], rel=1e-4), "a mean of rows is another figure"
        assert (one.higher_is_better, one.low, one.high, one.fault()) == (False, 0.0, None, None)


def test_they_are_the_same_on_ranks_of_which_one_has_less_to_do(stores: list[TokenStore]) -> None:
    folders = [store.path for store in stores]
    alone = losses(ALONE, folders)
    assert len(alone) % 2, "what this test is about"
    assert run_ranks(losses, 2, folders) == [alone, alone]


def test_a_second_time_no_model_is_loaded(stores: list[TokenStore], tmp_path: Path) -> None:
    rows = rows_to_score(stores, "validation", max_len=LONGEST, most=4)
    kept = tmp_path / "cache" / name_of("abc", rows, "fp32", "cpu")
    first = row_losses(model, rows, ALONE, kept)
    assert row_losses(partial(pytest.fail, "loaded"), rows, ALONE, kept) == first
    other = [replace(rows[0], id="a/other"), *rows[1:]]
    names = {
        name_of("abc", rows, "fp32", "cpu"),
        name_of("abd", rows, "fp32", "cpu"),
        name_of("abc", rows, "bf16", "cpu"),
    }
    assert len({*names, name_of("abc", other, "fp32", "cpu"), name_of("abc", rows, "fp32", "cuda")}) == 5


def test_rows_are_those_of_the_split_that_fit_spread_over_all(stores: list[TokenStore]) -> None:
    store = stores[0]
    everything = rows_to_score([store], "validation", max_len=10_000, most=None)
    assert [row.number for row in everything] == np.flatnonzero(store.split == VALIDATION).tolist()
    assert [row.id for row in everything] == [f"a/{name}" for name in store.row_ids([row.number for row in everything])]
    fit = rows_to_score([store], "validation", max_len=LONGEST, most=None)
    assert 0 < len(fit) < len(everything)
    assert all(store.lengths[row.number] <= LONGEST for row in fit)
    few = rows_to_score([store], "validation", max_len=10_000, most=3)
    assert len(few) == 3
    assert few[-1].number > everything[len(everything) // 2].number
    assert rows_to_score([store], "holdout", max_len=10_000, most=3) == []
    assert rows_to_score([store], "validation", max_len=1, most=3) == []
    leaked = replace(store, split=np.where(store.split == VALIDATION, LEAKED, store.split).astype(np.uint8))
    assert rows_to_score([leaked], "validation", max_len=10_000, most=None) == []


def test_no_rows_no_metric() -> None:
    assert loss_scores([], [], []) == {}


def test_base_and_tuned_are_compared_row_by_row(stores: list[TokenStore]) -> None:
    rows: list[Row] = rows_to_score(stores[:1], "validation", max_len=LONGEST, most=2)
    found = loss_scores(rows, [(6.0, 2.0), (1.0, 4.0)], [(8.0, 2.0), (4.0, 4.0)])["a.loss"]
    assert (found.ids, found.tuned, found.base, found.weights) == (
        [row.id for row in rows],
        [3.0, 0.25],
        [4.0, 1.0],
        [2.0, 4.0],
    )


def test_ids_of_another_tokenizer_are_refused(stores: list[TokenStore]) -> None:
    own = ChatTemplate.of(byte_tokenizer(specials=SPECIALS), "chatml")
    require_same_tokens(stores, own)
    require_same_tokens(stores, ChatTemplate.of(byte_tokenizer(specials=[*SPECIALS, "<|more|>"]), "chatml"))
    other = ChatTemplate.of(byte_tokenizer(specials=["<|more|>", *SPECIALS]), "chatml")
    with pytest.raises(
        DataError, match=r"b: given rows of another tokenizer .*'<\|more\|>' where the rows have '<\|im_start\|>'"
    ):
        require_same_tokens(stores, other)
