"""Loading: dtype, vocabulary, tied weights, and messages that say what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from sftdist.core.errors import ConfigError, StartupError
from sftdist.model.attention import implementation
from sftdist.model.config import load_config
from sftdist.model.load import (
    assert_tied_as_configured,
    begin_rows,
    decoder_layers,
    enable_checkpointing,
    is_tied,
    load_model,
    token_matrices,
)
from sftdist.model.loss import LossModel
from tests.models import VOCABULARY, shape, tiny_model
from tests.packed import gradients, random_row


def _saved(folder: Path, family: str) -> PreTrainedModel:
    model = tiny_model(family)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_its_weights_in_the_dtype_asked_for(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = _saved(tmp_path, family)
    config = load_config(str(tmp_path), None, None)
    model = load_model(config=config, path=str(tmp_path), attention="sdpa", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config._attn_implementation == implementation("sdpa")
    assert model.training
    assert model.config.use_cache, "the calls of the loss turn the cache off; an export must not inherit it"
    expected = dict(saved.named_parameters())
    assert all(torch.equal(p, expected[name].to(dtype)) for name, p in model.named_parameters())


def test_bf16_files_are_float32_in_memory(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(config=load_config(str(tmp_path), None, None), path=str(tmp_path), attention="sdpa")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_random_weights_follow_the_seed_alone() -> None:
    one, same, other = (tiny_model("llama", seed=seed) for seed in (0, 0, 1))
    equal = [torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True)]
    assert all(equal)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_vocabulary_grows_to_the_ids_in_use_and_is_never_cut(family: str, tmp_path: Path) -> None:
    saved = _saved(tmp_path, family)
    for used, rows in ((VOCABULARY - 5, VOCABULARY), (VOCABULARY, VOCABULARY), (VOCABULARY + 2, VOCABULARY + 64)):
        config = load_config(str(tmp_path), None, None)
        model = load_model(config=config, path=str(tmp_path), attention="sdpa", vocab_rows=used)
        assert model.config.vocab_size == rows
        assert is_tied(model) == (family == "llama_tied")
        for ours, theirs in (
            (model.get_input_embeddings().weight, saved.get_input_embeddings().weight),
            (model.get_output_embeddings().weight, saved.get_output_embeddings().weight),
        ):
            assert ours.shape[0] == rows
            assert torch.equal(ours[:VOCABULARY], theirs)
            torch.testing.assert_close(ours[VOCABULARY:], theirs.mean(dim=0).expand(rows - VOCABULARY, -1))


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_new_tokens_in_a_padded_vocabulary_begin_as_the_mean_of_the_rows_before_them(family: str) -> None:
    model = tiny_model(family)
    before = [matrix.detach().clone() for matrix in token_matrices(model)]
    begin_rows(model, [], nullcontext)
    assert all(map(torch.equal, token_matrices(model), before))
    begin_rows(model, [100, 101], nullcontext)
    for matrix, old in zip(token_matrices(model), before, strict=True):
        assert matrix.shape == old.shape
        for row in (100, 101):
            torch.testing.assert_close(matrix[row], old[:100].mean(dim=0))
        others = [row for row in range(VOCABULARY) if row not in (100, 101)]
        assert torch.equal(matrix[others], old[others])
    assert len(before) == (1 if family == "llama_tied" else 2)
    assert all(matrix.requires_grad for matrix in token_matrices(model))


def test_a_growing_vocabulary_is_loaded_before_it_is_partitioned() -> None:
    entered = []

    @contextmanager
    def partitioned() -> Iterator[None]:
        entered.append(True)
        yield

    config = AutoConfig.for_model(**shape("llama"))
    load_model(config=config, path=None, init="random", attention="sdpa", partitioned_init=partitioned())
    assert entered == [True]
    grown = {"vocab_rows": VOCABULARY + 1, "partitioned_init": partitioned()}
    load_model(config=config, path=None, init="random", attention="sdpa", **grown)  # type: ignore[arg-type]
    assert entered == [True]


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_config_that_lies_about_tied_weights_is_refused(family: str) -> None:
    model = tiny_model(family)
    model.config.tie_word_embeddings = not model.config.tie_word_embeddings
    with pytest.raises(StartupError, match="tie_word_embeddings"):
        assert_tied_as_configured(model)


def test_equal_values_are_not_tied() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    assert not is_tied(model)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_activation_checkpointing_changes_no_gradient(family: str) -> None:
    row = random_row([13, 1, 24, 9])
    config = AutoConfig.for_model(**shape(family))
    vectors = []
    for checkpointing in (False, True):
        model = load_model(
            config=config, path=None, init="random", attention="sdpa", activation_checkpointing=checkpointing
        )
        assert model.is_activation_checkpointing == checkpointing
        vectors.append(gradients(model, LossModel(model, num_sources=2)(**row.fields()).sum))
    assert torch.equal(*vectors)


def kept_bytes(model: PreTrainedModel, layers: int | None) -> tuple[int, torch.Tensor]:
    """What a forward keeps for its backward beside the weights, when so many layers are recomputed; the gradients."""
    row = random_row([13, 1, 24, 9])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    if layers is not None:
        enable_checkpointing(model, layers=layers)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = LossModel(model.train(), num_sources=2)(**row.fields()).sum
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), gradients(model, loss)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_recomputed_layer_saves_memory_and_changes_no_gradient(family: str) -> None:
    made = [kept_bytes(tiny_model(family, num_hidden_layers=4), layers) for layers in (None, 0, 1, 2, 3, 4)]
    plain, *sizes = [size for size, _ in made]
    assert plain == pytest.approx(sizes[0], rel=0.05)
    assert all(more > 1.2 * less for more, less in pairwise(sizes))
    assert all(torch.equal(vector, made[0][1]) for _, vector in made)


def test_more_recomputed_layers_than_there_are_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"model\.recompute_layers=3: llama has 2 layers .* give at most 2"):
        enable_checkpointing(model, layers=3)
    enable_checkpointing(model, layers=1)
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, False]  # the first ones


def test_messages_say_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"model\.path and model\.shape are both empty"):
        load_config(None, None, None)
    config = AutoConfig.for_model(**shape("llama"))
    with pytest.raises(ConfigError, match=r"needs model\.path.*model\.init=random"):
        load_model(config=config, path=None, attention="sdpa")
    falcon = AutoConfig.for_model("falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    with pytest.raises(ConfigError, match="falcon does not take its attention from transformers' registry"):
        load_model(config=falcon, path=None, init="random", attention="sdpa")
