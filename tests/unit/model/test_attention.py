"""Backends: what they honour, what is refused by name, and which one is chosen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from sftdist.core.errors import ConfigError
from sftdist.model.attention import choose, layer_arguments, needs
from sftdist.model.backends import sdpa
from sftdist.model.backends.interface import Backend, Documents, LayerArguments
from sftdist.model.backends.registry import open_backend
from tests.models import shape, tiny_model
from tests.packed import relative

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 16

Qkv = tuple[Tensor, Tensor, Tensor]


def _row(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Documents, Qkv]:
    generator = torch.Generator().manual_seed(5)
    documents = Documents.of_lengths(lengths)
    query, key, value = (
        torch.randn(1, documents.tokens, heads, SIZE, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return documents, (query, key, value)


def _written_out(tensors: Qkv, documents: Documents, arguments: LayerArguments) -> Tensor:
    """Every argument in the open, over the whole row at once: softmax of masked, capped scores with sinks."""
    q, k, v = (tensor[0].repeat_interleave(HEADS // tensor.shape[1], dim=0) for tensor in tensors)
    scores = q @ k.transpose(1, 2) * arguments.scaling
    if arguments.softcap is not None:
        scores = arguments.softcap * torch.tanh(scores / arguments.softcap)
    owner = torch.arange(len(documents.lengths)).repeat_interleave(torch.tensor(documents.lengths))
    index = torch.arange(documents.tokens)
    distance = index[:, None] - index[None, :]
    mask = (distance >= 0) & (owner[:, None] == owner[None, :])
    if arguments.sliding_window is not None:
        mask &= distance < arguments.sliding_window
    scores = scores.masked_fill(~mask, float("-inf"))
    if arguments.s_aux is not None:
        sink = arguments.s_aux.view(-1, 1, 1).expand(HEADS, documents.tokens, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : documents.tokens]
    return (weights @ v).transpose(0, 1)[None]


@pytest.mark.parametrize("lengths", [[1, 1, 1], [30, 1, 17, 5], [700, 40]])
@pytest.mark.parametrize("window", [None, 1, 6, 600])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_sdpa_output_and_gradients_equal_the_formula(
    lengths: list[int], window: int | None, softcap: float | None, sinks: bool
) -> None:
    documents, tensors = _row(lengths)
    sink = torch.linspace(-1.0, 2.0, HEADS).requires_grad_() if sinks else None
    arguments = LayerArguments(scaling=0.3, sliding_window=window, softcap=softcap, s_aux=sink)
    inputs = tensors if sink is None else [*tensors, sink]
    direction = torch.randn(1, documents.tokens, HEADS, SIZE, generator=torch.Generator().manual_seed(6))

    results = []
    for output in (sdpa.BACKEND(*tensors, documents, arguments), _written_out(tensors, documents, arguments)):
        results.append([output, *torch.autograd.grad((output * direction).sum(), inputs)])

    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).norm() < 1e-6 * (expected.norm() + expected.numel() ** 0.5)


@pytest.mark.parametrize("lengths", [[115, 40, 3], [300, 12]])
def test_short_documents_in_bf16_are_as_exact_as_torchs_kernel(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = LayerArguments(scaling=SIZE**-0.5)

    def results(dtype: torch.dtype, short: int) -> list[Tensor]:
        monkeypatch.setattr(sdpa, "SHORT", short)
        documents, tensors = _row(lengths, torch.bfloat16)
        query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
        output = sdpa.BACKEND(query, key, value, documents, arguments)
        return [output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))]

    exact, kernel, ours = results(torch.float32, 0), results(torch.bfloat16, 0), results(torch.bfloat16, 512)
    for expected, theirs, own in zip(exact, kernel, ours, strict=True):
        assert relative(own.float(), expected) < 1.5 * relative(theirs.float(), expected) + 1e-3


def test_an_argument_that_a_backend_lacks_is_refused_by_name() -> None:
    plain = Backend("plain", frozenset(), sdpa.BACKEND.attend)
    documents, tensors = _row([30, 5])
    for name, value in {"sliding_window": 6, "softcap": 2.0, "s_aux": torch.zeros(HEADS), "dropout": 0.1}.items():
        arguments = LayerArguments(scaling=1.0, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"plain was given {name}.*model\.attention=sdpa"):
            plain(*tensors, documents, arguments)
    plain(*tensors, documents, LayerArguments(scaling=1.0, sliding_window=30))  # no document is longer


@pytest.mark.parametrize(
    "given", [{"head_mask": torch.ones(4)}, {"position_bias": torch.ones(2)}, {"is_causal": False}]
)
def test_an_unknown_argument_of_a_layer_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        layer_arguments(torch.nn.Identity(), 8, given)
    harmless = {"head_mask": None, "output_attentions": False, "position_ids": torch.arange(3)}
    assert layer_arguments(torch.nn.Identity(), 16, harmless) == LayerArguments(scaling=0.25)


def test_a_call_without_documents_or_with_a_mask_is_refused() -> None:
    model = tiny_model("llama")
    ids = torch.arange(5)[None]
    with pytest.raises(ConfigError, match="did not receive the documents"):
        model(input_ids=ids, use_cache=False)
    with pytest.raises(ConfigError, match="2 rows"):
        model(input_ids=ids.repeat(2, 1), use_cache=False, documents=Documents.of_lengths([5]))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", set()),
        ("mistral", {"sliding_window"}),
        ("gemma2", {"sliding_window", "softcap"}),
        ("gpt_oss", {"sliding_window", "s_aux"}),
    ],
)
def test_needs_are_read_from_the_config(family: str, expected: set[str]) -> None:
    assert needs(AutoConfig.for_model(**shape(family))) == expected


def test_on_a_cpu_auto_is_sdpa_and_the_reasons_are_told() -> None:
    choice = choose("auto", CPU, torch.bfloat16, AutoConfig.for_model(**shape("llama")))
    assert choice.name == "sdpa"
    assert [reason.split()[0] for reason in choice.rejected] == ["flash_attn", "torch_varlen"]
    with pytest.raises(ConfigError, match=r"torch_varlen does not run on cpu.*model\.attention=auto"):
        choose("torch_varlen", CPU, torch.bfloat16, AutoConfig.for_model(**shape("llama")))


def test_a_backend_that_lacks_what_the_model_needs_is_not_chosen() -> None:
    with pytest.raises(ConfigError, match=r"torch_varlen does not support softcap, which gemma2 needs"):
        choose("torch_varlen", CPU, torch.bfloat16, AutoConfig.for_model(**shape("gemma2")))


@pytest.mark.parametrize(
    "content",
    [
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')",
        "raise OSError('libcudart')",
        "raise AttributeError('triton has no attribute')",
        "raise ModuleNotFoundError('No module named einops', name='einops')",
    ],
)
def test_a_broken_flash_attn_is_reported_and_passed_over(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A25: a build for another torch fails at import with an undefined symbol."""
    (tmp_path / "flash_attn.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "sftdist.model.backends.flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    reason = open_backend("flash_attn")
    assert isinstance(reason, str)
    assert "cannot be imported" in reason
    assert content.split("'")[1] in reason
    assert "sftdist doctor" in reason
    config = AutoConfig.for_model(**shape("llama"))
    choice = choose("auto", CPU, torch.float32, config)
    assert choice.name == "sdpa"
    assert choice.rejected[0] == reason
    with pytest.raises(ConfigError) as refused:
        choose("flash_attn", CPU, torch.float32, config)
    assert str(refused.value) == f"model.attention=flash_attn: {reason}; set model.attention=auto"


def test_an_absent_flash_attn_is_not_called_broken() -> None:
    assert open_backend("flash_attn") == "flash_attn is not installed"


def test_a_working_flash_attn_is_called_with_windows_that_count_the_keys_before_the_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is absent here: what it is called with is what can be tested."""
    (tmp_path / "flash_attn.py").write_text(
        "calls = []\ndef flash_attn_varlen_func(q, k, v, **given):\n    calls.append(given)\n    return q\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "sftdist.model.backends.flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    backend = open_backend("flash_attn")
    assert isinstance(backend, Backend)
    documents, tensors = _row([30, 5])
    for window in (None, 8, 30):
        backend(*tensors, documents, LayerArguments(scaling=0.5, sliding_window=window, softcap=3.0))
    calls = sys.modules["flash_attn"].calls
    assert [call["window_size"] for call in calls] == [(-1, 0), (7, 0), (-1, 0)]
    assert all(call["causal"] and call["softcap"] == 3.0 and call["max_seqlen_q"] == 30 for call in calls)
    for name in ("flash_attn", "sftdist.model.backends.flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
