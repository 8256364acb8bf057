"""Start-up checks: what leaks, looks ahead or differs is refused by name, and no check leaves a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftdist.core.errors import StartupError
from sftdist.model.attention import implementation
from sftdist.model.backends.interface import Documents, LayerArguments
from sftdist.model.backends.sdpa import BACKEND
from sftdist.model.checks import check_isolation, check_logits, check_parity
from sftdist.model.load import load_model
from sftdist.model.lora import LoraSpec, attach
from tests.models import MIXTURES_OF_EXPERTS, SHAPES, VOCABULARY, tiny_model

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _other_model(model_type: str, **sizes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    return load_model(config=config, path=None, init="random", attention="sdpa").eval()


@pytest.mark.parametrize("family", sorted(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_passes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    isolation = check_isolation(model, VOCABULARY, CPU)
    assert isolation is not None
    assert isolation.exact or family in MIXTURES_OF_EXPERTS
    assert isolation.control > 0.1
    assert check_logits(model, VOCABULARY, CPU) < 0.03


def test_adapters_and_checkpointing_do_not_stand_in_the_way() -> None:
    model = tiny_model("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    adapted, _ = attach(model, LoraSpec(r=2), train_rows=[5])
    assert check_isolation(adapted, VOCABULARY, CPU) is not None
    assert check_logits(adapted, VOCABULARY, CPU) < 1e-5
    assert check_parity(adapted, BACKEND, VOCABULARY, CPU, longest=64).layers == 2


def test_checks_leave_no_trace() -> None:
    model = tiny_model("gemma2").train()
    model.model.layers[0].mlp.eval()  # a mode of its own, to be put back
    modes = [module.training for module in model.modules()]
    before, weights = torch.random.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    check_isolation(model, VOCABULARY, CPU)
    check_logits(model, VOCABULARY, CPU)
    check_parity(model, BACKEND, VOCABULARY, CPU, longest=64)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert model.config._attn_implementation == implementation("sdpa")


class _Recurrent(nn.Module):
    """A running mean of the embeddings: a state that knows no documents."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)

    def forward(self, input_ids: Tensor, **ignored: Any) -> BaseModelOutput:
        steps = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        return BaseModelOutput(last_hidden_state=self.embedding(input_ids).cumsum(dim=1) / steps)


class _RecurrentLM(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = _Recurrent(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_a_leaking_recurrent_model_is_refused_for_packing_only() -> None:
    model = _RecurrentLM(LlamaConfig(**SIZES))
    with pytest.raises(StartupError, match=r"neighbours .* set train\.packing=false"):
        check_isolation(model, VOCABULARY, CPU)
    with pytest.raises(StartupError, match=r"attention registry.*set train\.packing=false"):
        check_parity(model, BACKEND, VOCABULARY, CPU, longest=64)
    assert check_isolation(model, VOCABULARY, CPU, packed=False) is None
    assert check_parity(model, BACKEND, VOCABULARY, CPU, longest=64, packed=False).layers == 0


def test_a_real_state_space_model_is_refused_for_packing() -> None:
    with pytest.raises(StartupError, match=r"set train\.packing=false"):
        check_isolation(_other_model("mamba", state_size=4), VOCABULARY, CPU)


def test_layers_that_know_that_they_leak_are_refused_for_packing_and_run_without() -> None:
    model = _other_model(
        "qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    with pytest.raises(StartupError, match=r"set train\.packing=false"):
        check_isolation(model, VOCABULARY, CPU)
    assert check_isolation(model, VOCABULARY, CPU, packed=False) is None
    assert check_logits(model, VOCABULARY, CPU) < 1e-5


def test_a_model_that_sees_the_future_is_refused_with_and_without_packing() -> None:
    """Bloom bypasses the registry and takes no mask from it: nothing hides the future."""
    model = _other_model("bloom", n_head=4, n_layer=2)
    for packed in (True, False):
        with pytest.raises(StartupError, match="sees the future"):
            check_isolation(model, VOCABULARY, CPU, packed=packed)


def test_an_attention_that_ignores_the_documents_is_refused() -> None:
    """S7: positions restart, but the kernel attends over the whole row."""

    def joined(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2), None

    model = tiny_model("llama")
    ALL_ATTENTION_FUNCTIONS.register(implementation("sdpa"), joined)
    try:
        with pytest.raises(StartupError, match="neighbours"):
            check_isolation(model, VOCABULARY, CPU)
    finally:
        tiny_model("llama")  # loading registers the honest one again
    assert check_isolation(model, VOCABULARY, CPU) is not None


def test_chunked_attention_that_reaches_a_layer_only_as_a_mask_is_refused() -> None:
    model = _other_model(
        "llama4_text",
        attention_chunk_size=8,
        intermediate_size_mlp=48,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with pytest.raises(StartupError, match="Llama4TextAttention"):
        check_parity(model, BACKEND, VOCABULARY, CPU, longest=64)
    check_parity(model, BACKEND, VOCABULARY, CPU, longest=8)  # no document is longer than a chunk


@pytest.mark.parametrize(
    ("model_type", "sizes"), [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})]
)
def test_scaled_logits_are_the_models_own(model_type: str, sizes: dict[str, float]) -> None:
    assert check_logits(_other_model(model_type, **sizes), VOCABULARY, CPU) < 1e-5


@pytest.mark.parametrize(("family", "field"), [("gemma2", "final_logit_softcapping"), ("llama", "logit_scale")])
def test_logits_that_the_loss_would_change_are_refused(family: str, field: str) -> None:
    model = tiny_model(family)
    setattr(model.config, field, 0.7)  # Gemma reads it at each call, Llama never
    if family == "gemma2":
        model.forward = _uncapped(model)
    with pytest.raises(StartupError, match="logits check"):
        check_logits(model, VOCABULARY, CPU)


def _uncapped(model: PreTrainedModel) -> Any:
    def forward(**arguments: Any) -> Any:
        hidden = model.get_decoder()(**arguments).last_hidden_state
        return type("Output", (), {"logits": model.get_output_embeddings()(hidden)})

    return forward


def test_the_documents_of_a_row_are_validated() -> None:
    for bounds in ([0], [1, 4], [0, 4, 4], [0, 5, 3]):
        with pytest.raises(ValueError, match="increase strictly"):
            Documents.of(torch.tensor(bounds, dtype=torch.int32))
    query = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="5 tokens, its documents 6"):
        BACKEND(query, query, query, Documents.of_lengths([4, 2]), LayerArguments(scaling=1.0))
