"""Layers that carry a state along the row: told where documents end, refused for packing where they do not heed it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from sftdist.core.errors import ConfigError, StartupError
from sftdist.model import cost
from sftdist.model.backends.interface import Documents
from sftdist.model.checks import check_isolation, check_logits
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.text_part import convolutions
from tests.models import HYBRIDS, VOCABULARY, tiny_model

CPU = torch.device("cpu")


@pytest.mark.skipif(importlib.util.find_spec("causal_conv1d") is not None, reason="causal_conv1d keeps them apart")
@pytest.mark.parametrize("family", HYBRIDS)
def test_packs_are_refused_and_single_documents_are_not(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(StartupError, match=r"isolation check: .*[^.]: set train\.packing=false|neighbours"):
        check_isolation(model, VOCABULARY, CPU)
    assert check_isolation(model, VOCABULARY, CPU, packed=False) is None
    assert check_logits(model, VOCABULARY, CPU) < 1e-5


def test_every_border_is_named_in_both_of_transformers_ways() -> None:
    given = Documents.of_lengths([2, 1, 3]).model_arguments()
    assert given["cu_seq_lens_q"].tolist() == [0, 2, 3, 6]
    assert given["seq_idx"].tolist() == [[0, 0, 1, 2, 2, 2]]
    assert given["seq_idx"].dtype == torch.int32
    assert set(Documents.of_lengths([6]).model_arguments()) == {"documents"}, "one document has no border"


class _Shifted(nn.Module):
    """A layer that sees one token back, and forgets to stop at a border."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        found: Tensor = self.layer(hidden, *args, **kwargs)
        return found + seen


def test_a_leak_of_a_single_token_is_found() -> None:
    """A convolution of two places shows at the last token of a document alone."""
    model = tiny_model("llama", num_hidden_layers=1)
    model.model.norm = _Shifted(model.model.norm)
    with pytest.raises(StartupError, match="neighbours"):
        check_isolation(model, VOCABULARY, CPU)


def test_short_convolutions_take_no_adapters() -> None:
    model = tiny_model("qwen3_next")
    assert [parameter.ndim for _, parameter in convolutions(model)] == [3]
    _, coverage = attach(model, LoraSpec(r=2))
    assert coverage.experts
    assert not [name for name in coverage.experts if "conv" in name]


def test_a_model_without_attention_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="given mamba2, a model without attention"):
        cost.parameters({"model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 128})
