"""X11: our attention is the model's own: against transformers' eager function on random queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sftdist.core.errors import StartupError
from sftdist.model.backends.interface import Backend, Documents, LayerArguments
from sftdist.model.backends.sdpa import BACKEND
from sftdist.model.checks import check_parity
from tests.models import SHAPES, VOCABULARY, WINDOWED, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", sorted(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_layer_equals_eager_attention(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    parity = check_parity(model, BACKEND, VOCABULARY, CPU, longest=4096)
    kinds = 2 if family in {"gemma2", "gemma3", "gpt_oss"} else 1
    assert len(parity.errors) == kinds
    assert parity.layers == 2
    assert parity.covers_windows
    assert family not in WINDOWED or any("window 8" in kind for kind in parity.errors)


def test_windows_longer_than_a_block_of_queries() -> None:
    model = tiny_model("mistral", sliding_window=600)
    assert check_parity(model, BACKEND, VOCABULARY, CPU, longest=4096).tokens == 632


def _ignoring(**fields: Any) -> Backend:
    def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, given: LayerArguments) -> Tensor:
        return BACKEND.attend(query, key, value, documents, replace(given, **fields))

    return Backend("careless", BACKEND.supports, attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "ignored"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 9}),
        ("phi3", {"sliding_window": 7}),
        ("gemma3", {"sliding_window": None}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"s_aux": None}),
        ("gpt_oss", {"sliding_window": None}),
        ("qwen3", {"scaling": 1.0}),
    ],
)
def test_an_ignored_or_shifted_argument_is_rejected(family: str, ignored: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    with pytest.raises(StartupError, match="differs from the model's own eager attention"):
        check_parity(model, _ignoring(**ignored), VOCABULARY, CPU, longest=4096)


def test_a_soft_cap_of_gemmas_own_size_is_seen_when_ignored() -> None:
    model = tiny_model("gemma2", attn_logit_softcapping=50.0)
    check_parity(model, BACKEND, VOCABULARY, CPU, longest=4096)
    with pytest.raises(StartupError, match="softcap 50"):
        check_parity(model, _ignoring(softcap=None), VOCABULARY, CPU, longest=4096)


def test_a_mask_that_only_the_model_knows_is_noticed() -> None:
    """Chunked attention reaches the layer as a mask, not as an argument: only a comparison finds it."""
    model = tiny_model("llama")
    model.config.attention_chunk_size = 8  # the length of the check must go beyond it
    assert check_parity(model, BACKEND, VOCABULARY, CPU, longest=4096).tokens == 40
