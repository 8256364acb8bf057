"""The base of QLoRA: what lies in 4 bits, that it computes as its whole values would, and what is made of it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sftdist.core.config import compose, config_hash
from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError
from sftdist.model import cost
from sftdist.model.backends import quant
from sftdist.model.backends.interface import Documents
from sftdist.model.backends.registry import open_quantisation
from sftdist.model.compiled import compile_layers
from sftdist.model.load import enable_checkpointing
from sftdist.model.lora import LoraSpec, attach, load_adapter, merged_parameters, save_adapter
from sftdist.model.loss import LossModel
from sftdist.model.quantised import (
    BASE_QUANTISATION,
    is_quantised,
    quantisation_of,
    quantise,
    require_quantisation,
    whole,
    whole_shape,
)
from sftdist.training.replicated import Replicated
from sftdist.training.tensor_file import write_tensors
from sftdist.training.zero_config import EngineSpec
from tests.models import tiny_model
from tests.packed import gradients, random_row
from tests.training_cases import SGD

CPU = torch.device("cpu")
LORA = LoraSpec(r=4, alpha=8)
DORA = LoraSpec(r=4, alpha=8, dora=True)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # of rows that PEFT reads rightly, too
IDS = torch.arange(3, 60, 2)


def base(family: str = "llama", dtype: torch.dtype = torch.float32, double_quant: bool = True, **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    quantise(model, double_quant=double_quant, dtype=dtype, device=CPU)
    return model


def whole_base(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    """The same model in plain layers that hold the values that the 4 bits stand for."""
    model, packed = tiny_model(family, **changes), base(family, dtype, **changes)
    with torch.no_grad():
        for (name, parameter), (other, bits) in zip(model.named_parameters(), packed.named_parameters(), strict=True):
            assert name == other
            parameter.copy_(whole(bits))
    return model


def adapted(model: Any, dtype: torch.dtype = torch.float32, spec: LoraSpec = LORA, rows: tuple[int, ...] = ()) -> Any:
    """With adapters that change something, in the compute dtype as an engine has them."""
    torch.manual_seed(0)
    model, _ = attach(model, spec, train_rows=rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if not is_quantised(parameter):
                parameter.data = parameter.data.to(dtype)
    return model


def step(model: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one pack."""
    module = LossModel(model, num_sources=2, chunk=16).train()
    loss = module(**random_row([7, 20, 5], seed=0).fields()).sum
    return loss.detach(), gradients(module, loss)


def logits(model: Any) -> Tensor:
    documents = Documents.of_lengths([len(IDS)], CPU)
    with torch.no_grad():
        output = model.eval()(input_ids=IDS[None], use_cache=False, **documents.model_arguments())
    found: Tensor = output.logits[0].float()
    return found


def test_the_linear_layers_lie_in_4_bits_and_nothing_else_does() -> None:
    model, plain = base("qwen2", torch.bfloat16), tiny_model("qwen2")
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name, module in plain.named_modules():
        in_bits = isinstance(module, nn.Linear) and name != "lm_head"
        assert kinds[name] is (quant.FrozenLinear4bit if in_bits else type(module)), name
    for (name, bits), (_, value) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert whole_shape(bits) == value.shape
        assert whole(bits).shape == value.shape
        error = float((whole(bits) - value.detach()).norm() / value.detach().norm())
        assert (0.08 < error < 0.11) if is_quantised(bits) else torch.equal(bits, value), (name, error)
        assert not is_quantised(bits) or torch.equal(whole(bits), whole(bits).bfloat16().float()), "the compute dtype"
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert not model.training


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_planner_knows_the_bytes(double_quant: bool) -> None:
    """Of layers wide enough that the table of the 16 levels does not count."""
    model = base("llama", torch.bfloat16, double_quant, hidden_size=256, intermediate_size=512)
    held = 0.0
    for parameter in model.parameters():
        held += parameter.numel() * (1 if is_quantised(parameter) else 2)
        if is_quantised(parameter):
            state: Any = parameter.quant_state
            held += state.absmax.numel() * state.absmax.itemsize
            held += state.state2.absmax.numel() * 4 if state.nested else 0
    setup = cost.Setup(
        stage=0,
        world=1,
        pack_tokens=8,
        precision="bf16",
        trainable=0,
        checkpointing=False,
        quantised=True,
        double_quant=double_quant,
    )
    assert cost.memory(model.config.to_dict(), setup)["weights"] == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize(("spec", "changes"), [(LORA, {}), (DORA, WIDE)], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradients_are_those_of_lora_over_the_whole_values(
    dtype: torch.dtype, spec: LoraSpec, changes: dict[str, Any]
) -> None:
    """Bit for bit on a CPU: both multiply the same values in the same order. And not those of LoRA over the base."""
    loss, gradient = step(adapted(base("qwen2", dtype, **changes), dtype, spec))
    expected, wanted = step(adapted(whole_base("qwen2", dtype, **changes), dtype, spec))
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, wanted)
    assert gradient.norm() > 0
    other, elsewhere = step(adapted(tiny_model("qwen2", **changes), dtype, spec))
    assert abs(float(loss - other)) > 1e-4 * float(other)
    assert (gradient - elsewhere).norm() > 0.1 * elsewhere.norm()
    single = base("qwen2", dtype, double_quant=False, **changes)
    assert not torch.equal(gradient, step(adapted(single, dtype, spec))[1])


def test_recomputed_activations_change_nothing() -> None:
    plain, again = base(), tiny_model("llama")
    enable_checkpointing(again)
    quantise(again, double_quant=True, dtype=torch.float32, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(step(adapted(plain)), step(adapted(again)), strict=True))


def test_an_engine_and_an_evaluation_leave_the_bits_alone() -> None:
    """Packed bits are no numbers to be cast; and bitsandbytes itself repacks them at an evaluation on some CPUs."""
    model = adapted(base())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if is_quantised(p)}
    module = LossModel(model, num_sources=2)
    core = Replicated(module, SGD, EngineSpec(0, "bf16"), World(0, 1, 0, CPU))
    first = logits(model.bfloat16())
    assert torch.equal(logits(model), first)
    after = {name: p for name, p in model.named_parameters() if is_quantised(p)}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], bits) and after[name].dtype == torch.uint8 for name, bits in before.items())
    assert {p.dtype for p in model.parameters() if not is_quantised(p)} == {torch.bfloat16}
    core.close()


@pytest.mark.parametrize(
    ("spec", "changes", "rows"),
    [(LORA, {}, ()), (LORA, {}, (5, 6)), (DORA, WIDE, ())],
    ids=["lora", "rows", "dora"],
)
def test_the_merged_model_is_the_one_that_was_trained(
    spec: LoraSpec, changes: dict[str, Any], rows: tuple[int, ...]
) -> None:
    """Onto what the 4 bits stand for; onto the base as it was before, it would be another model."""
    model = adapted(base("llama_tied", **changes), spec=spec, rows=rows)
    expected = logits(model)
    values = {name: whole(parameter) for name, parameter in model.named_parameters()}
    plain = tiny_model("llama_tied", **changes)
    original = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    merged = dict(merged_parameters(model, values.__getitem__))

    def filled(weights: dict[str, Tensor]) -> Tensor:
        plain.load_state_dict(weights, strict=False)
        return logits(plain)

    assert merged.keys() == original.keys()
    assert (filled(merged) - expected).norm() < 1e-5 * expected.norm()
    quantised = dict(base("llama_tied", **changes).named_parameters())
    onto_original = {name: value + (merged[name] - whole(quantised[name])) for name, value in original.items()}
    assert (filled(onto_original) - expected).norm() > 1e-2 * expected.norm()


def test_an_adapter_alone_says_how_its_base_lay(tmp_path: Path) -> None:
    """And is loaded onto such a base: onto the plain one it says something else."""
    model = adapted(base(double_quant=False))
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = save_adapter(model, trained, tmp_path)
    write_tensors({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "adapter_model.safetensors")
    described = json.loads((tmp_path / BASE_QUANTISATION).read_text())
    assert described == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
    }
    loaded: Any = load_adapter(tmp_path)
    assert quantisation_of(loaded) == described
    assert (logits(loaded) - logits(model)).norm() < 1e-5 * logits(model).norm(), "transformers' own attention"
    (tmp_path / BASE_QUANTISATION).unlink()
    assert (logits(load_adapter(tmp_path)) - logits(model)).norm() > 1e-2 * logits(model).norm()


@pytest.mark.parametrize(
    ("family", "words"),
    [("mixtral", "mlp.experts.gate_up_proj [4, 96, 32]"), ("gpt2", "attn.c_attn.weight [32, 96]")],
)
def test_a_model_that_would_stay_as_it_is_is_refused(family: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"tune\.method=qlora: given a model with") as caught:
        base(family)
    assert words in str(caught.value)
    assert "required that bitsandbytes can hold the model in 4 bits" in str(caught.value)
    assert "set tune.method=lora" in str(caught.value)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "sftdist.model.backends.quant")
    assert isinstance(open_quantisation(), str)
    with pytest.raises(ConfigError, match=r"tune.method=qlora: bitsandbytes .*pip install 'sftdist\[quant\]'"):
        require_quantisation(CPU, torch.float32)


def test_where_it_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(quant, "_values", no_kernel)
    with pytest.raises(ConfigError, match="bitsandbytes does not run on cpu: no kernel image;"):
        require_quantisation(CPU, torch.bfloat16)


def test_values_that_come_back_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own reading of rows of 32 is such, on CPUs with AVX-512: of that DoRA hears, and LoRA needs not."""
    model = base("llama")
    monkeypatch.setattr(quant, "read_alike", lambda weight: False)
    with pytest.raises(ConfigError, match=r"tune\.dora=true with tune\.method=qlora: PEFT would read other values"):
        attach(model, DORA)
    attach(model, LORA)
    right = quant._values
    monkeypatch.setattr(quant, "_values", lambda packed, state: right(packed, state).flip(0))
    with pytest.raises(ConfigError, match=r"q_proj \[32, 32\] comes back from bitsandbytes with an error of 1\d\d%"):
        base("llama")


def test_what_is_quantised_belongs_to_the_identity_of_a_run() -> None:
    words = ["model.path=m", "data.train=d.jsonl"]
    configs = [compose("qlora", [*words, *more]) for more in ([], ["tune.double_quant=false"], ["tune.method=lora"])]
    assert len({config_hash(cfg) for cfg in configs}) == 3


def test_dora_needs_whole_weights_at_zero_3() -> None:
    words = ["model.path=m", "data.train=d.jsonl", "tune.dora=true"]
    assert compose("qlora", [*words, "zero.stage=2"]).tune.dora
    with pytest.raises(ConfigError, match=r"tune\.dora=true with zero\.stage=3: .* set zero\.stage=2"):
        compose("qlora", [*words, "zero.stage=3"])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers(backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = adapted(base()), adapted(base())
    compile_layers(compiled, backend)
    for found, expected in zip(step(compiled), step(eager), strict=True):
        assert (found - expected).norm() <= 2e-6 * expected.norm()
    torch._dynamo.reset()
