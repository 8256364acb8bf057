"""Low-rank adapters through PEFT (the only import of it): what trains, token rows included, and the proven merge.

A base in 4 bits has plain adapters around its layers, not PEFT's 4-bit ones: those round what they merge to 4 bits.
LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, DoRA https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

from sftdist.model import silence  # noqa: F401 - before PEFT

# isort: split
import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.core.storage import read_json, write_json
from sftdist.model.load import grow_vocabulary, is_tied, token_matrices
from sftdist.model.quantised import (
    BASE_QUANTISATION,
    is_quantised,
    quantisation_of,
    quantise_as,
    require_read_alike,
    whole_shape,
)
from sftdist.model.text_part import convolutions, decoder_prefix, outside_text

ALL_LINEAR = "all-linear"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MERGE_TOLERANCE = 1e-3  # of what an adapter changes in a layer's outputs; merged and compared in float32
ROUNDING = 1e-5  # of the outputs themselves
UNTRAINED_NORM = 0.1  # of the median norm of a row
UNTRAINED_DISTANCE = 0.05  # of the median distance between rows

Gathered = Callable[[nn.Parameter], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """`target`: "all-linear" (every linear layer but the head, and fused experts) or a list of module names."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    target: str | Sequence[str] = ALL_LINEAR


@dataclass(frozen=True, slots=True)
class Coverage:
    """What an adapter trains. `not_reached`: fused expert weights it leaves out, each with the reason."""

    layers: int
    experts: tuple[str, ...]
    not_reached: tuple[str, ...]
    token_rows: tuple[int, ...]
    trainable: int
    total: int


@dataclass(frozen=True, slots=True)
class LayerMerge:
    """What the merge of one layer did. `change`: norm of the change over the norm of the weights. `error`: of the
    merged layer's outputs, as a share of what the adapter changes in them. `kept`: the share of the change that is left
    after rounding to the dtype that is written. `written`: whether any rounded weight differs from the base's."""

    change: float
    error: float
    kept: float
    written: bool


def attach(model: PreTrainedModel, spec: LoraSpec, *, train_rows: Sequence[int] = ()) -> tuple[PeftModel, Coverage]:
    """Freeze the model and add adapters; `train_rows` are token rows of embeddings and head that train in full.

    Raises ConfigError if a target matches nothing, or token rows cannot be trained on this engine.
    """
    experts, not_reached = _experts(model, spec)
    _refuse_partitioned_rows(model, train_rows)
    if spec.dora:
        require_read_alike(model)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.r,
        lora_alpha=spec.alpha,  # PEFT only divides by it: a fraction is as good as an integer
        lora_dropout=spec.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores weights transposed
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=_targets(model, _linear_names(model) if spec.target == ALL_LINEAR else list(spec.target)),
        target_parameters=experts or None,
        trainable_token_indices=_row_targets(model, train_rows) or None,
    )
    try:
        with _old_question():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"tune.target={spec.target}: {error}") from error
    return adapted, Coverage(
        layers=len(list(_adapter_layers(adapted))),
        experts=tuple(experts),
        not_reached=tuple(not_reached),
        token_rows=tuple(train_rows),
        trainable=sum(_size(p) for p in adapted.parameters() if p.requires_grad),
        total=sum(_size(p) for p in adapted.parameters()),
    )


@contextmanager
def _old_question() -> Iterator[None]:
    """PEFT asks a question that transformers has renamed: nobody here can change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _targets(model: PreTrainedModel, names: list[str]) -> list[str] | str:
    """The names; beside a vision tower, whose layers have the same ones, an expression for those of the decoder."""
    if not outside_text(model):
        return names
    last = "|".join(re.escape(name) for name in names)
    return rf"{re.escape(decoder_prefix(model))}(.*\.)?({last})"


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Names that match every linear layer but the head: the short ones (q_proj, ...) where they are unambiguous.

    PEFT's own "all-linear" also rewrites the targets of some mixtures of experts; here the report must know them.
    """
    head, prefix = model.get_output_embeddings(), decoder_prefix(model)
    names = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and (module is head or name.startswith(prefix))
    }
    inside = [name for name, module in names.items() if module is not head]
    short = {name.rsplit(".", 1)[-1] for name in inside}
    outside = {name.rsplit(".", 1)[-1] for name, module in names.items() if module is head}
    return sorted(inside if short & outside else short)


def _experts(model: PreTrainedModel, spec: LoraSpec) -> tuple[list[str], list[str]]:
    """Names of fused expert weights that "all-linear" reaches, and lines about those that it does not.

    They are 3-D parameters (experts, in, out), no linear layers: PEFT knows them as `target_parameters`.
    """
    others = {id(parameter) for parameter in outside_text(model).values()}
    others |= {id(parameter) for _, parameter in convolutions(model)}
    three = [(name, parameter) for name, parameter in model.named_parameters() if len(_shape(parameter)) == 3]
    fused = [name for name, parameter in three if id(parameter) not in others]
    if not fused or spec.target != ALL_LINEAR:
        return [], [f"{name}: tune.target names modules, it is a parameter" for name in fused]
    options = {"tune.dora=true": spec.dora, "tune.dropout": spec.dropout > 0.0}
    blocked = [name for name, is_set in options.items() if is_set]
    if blocked:
        return [], [f"{name}: PEFT adapts fused experts without {' and '.join(blocked)} only" for name in fused]
    return fused, []


def _row_targets(model: PreTrainedModel, rows: Sequence[int]) -> dict[str, list[int]]:
    """Module name -> rows. A tied head follows the embeddings by itself; a head of its own is named too."""
    if not rows:
        return {}
    modules = [model.get_input_embeddings()]
    modules += [] if is_tied(model) else [model.get_output_embeddings()]
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[module]: list(rows) for module in modules}


def _refuse_partitioned_rows(model: PreTrainedModel, rows: Sequence[int]) -> None:
    weight = model.get_input_embeddings().weight
    if rows and hasattr(weight, "ds_id") and not torch.cuda.is_available():
        raise ConfigError(
            f"{len(rows)} token rows must be trained beside the adapter, which PEFT does under ZeRO-3 on CUDA only: "
            "set zero.stage=2"
        )


def _shape(parameter: nn.Parameter) -> torch.Size:
    return whole_shape(parameter)


def _size(parameter: nn.Parameter) -> int:
    return _shape(parameter).numel()


def _adapter_layers(model: nn.Module) -> Iterable[tuple[str, BaseTunerLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def untrained_rows(
    model: PreTrainedModel, ids: Iterable[int], gathered: Gathered = lambda parameter: nullcontext()
) -> list[int]:
    """Of these token ids the ones whose embedding or head row was never trained: near zero, or equal to a neighbour.

    Both are measured against the whole matrix. `gathered` makes a partitioned weight whole while it is read.
    """
    wanted = sorted(set(ids))
    found: set[int] = set()
    for matrix in token_matrices(model):
        with gathered(matrix):
            found |= _untrained(matrix.detach(), wanted)
    return sorted(found)


def _untrained(matrix: Tensor, ids: Sequence[int]) -> set[int]:
    """Rows with a norm under a tenth of the median, or far nearer to a neighbour than rows usually are."""
    rows = matrix.shape[0]
    sample = torch.linspace(0, rows - 2, min(rows - 1, 4096)).long().to(matrix.device)
    usual_norm = matrix[sample].float().norm(dim=1).median()
    usual_distance = (matrix[sample].float() - matrix[sample + 1].float()).norm(dim=1).median()
    found = set()
    for index in ids:
        row = matrix[index].float()
        neighbours = [matrix[n].float() for n in (index - 1, index + 1) if 0 <= n < rows]
        nearest = min((row - other).norm() for other in neighbours)
        if row.norm() < UNTRAINED_NORM * usual_norm or nearest < UNTRAINED_DISTANCE * usual_distance:
            found.add(index)
    return found


def merged_parameters(
    model: PeftModel,
    full: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
    proofs: dict[str, LayerMerge] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model underneath, its name there and its merged float32 value, one layer at a time.

    The model stays as it is, partitioned or not: `full(name)` gives the whole float32 value of one of its parameters,
    the same calls in the same order on every rank. Each merge is proven against the layer's own forward; `proofs` gets
    what it did, and what is left of it when the caller rounds to `dtype`. Raises CheckpointError that names the layer.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[int, tuple[str, nn.Module]] = {}
    adapters: set[int] = set()
    for layer_name, layer in _adapter_layers(model):
        base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        adapters |= {id(parameter) for parameter in layer.parameters()} - base
        for index in base:
            owners.setdefault(index, (layer_name, layer))  # the outermost layer comes first, and holds the others
    merged: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        index = id(parameter)
        if index in adapters:
            continue
        if index in owners and index not in merged:
            layer_name, layer = owners[index]
            values = {id(part): full(names[id(part)]) for part in layer.parameters()}
            found, proof = _merged_copy(_name_underneath(layer_name), layer, values, dtype)
            merged |= found
            del values, found  # the caller holds one value at a time, and so does this
            if proofs is not None:
                proofs[_name_underneath(layer_name)] = proof
        yield _name_underneath(name), merged.pop(index) if index in merged else full(name)


@torch.no_grad()
def _merged_copy(
    name: str, layer: nn.Module, values: Mapping[int, Tensor], dtype: torch.dtype
) -> tuple[dict[int, Tensor], LayerMerge]:
    """The merged weights of a layer by the identity of the live ones; merged by PEFT in a copy of the layer."""
    twin = _standalone(layer, values).eval()
    live = [id(parameter) for parameter in _innermost(layer).parameters()]
    error = _merge_and_compare(name, twin)
    merged = [parameter.detach() for parameter in _innermost(twin).parameters()]
    proof = _proof([values[index] for index in live], merged, error, dtype)
    return dict(zip(live, merged, strict=True)), proof


def _merge_and_compare(name: str, twin: nn.Module) -> float:
    """Merge the adapters of a standalone layer. For a few random inputs it must give what base + adapter gave, by the
    forward that was trained and not by the formula of the merge; returns the largest error."""
    parts = [part for _, part in _adapter_layers(twin)]
    inputs = [_inputs(part) for part in parts]
    plain = [_base_output(part, x) for part, x in zip(parts, inputs, strict=True)]
    wanted = [_adapted_output(part, x) for part, x in zip(parts, inputs, strict=True)]
    for part in parts:
        part.merge(safe_merge=True)
    errors = [0.0]
    for part, x, base, expected in zip(parts, inputs, plain, wanted, strict=True):
        if x is None or base is None or expected is None:
            continue
        change = float((expected - base).norm())
        error = float((_base_output(part, x) - expected).norm())
        if not error <= MERGE_TOLERANCE * change + ROUNDING * float(base.norm()):
            raise CheckpointError(
                f"merge: {name} merged is not base + adapter: its outputs differ by {error:.3g}, where the adapter "
                f"changes them by {change:.3g}; export the adapter alone with export.merge=false"
            )
        errors.append(error / change if change else 0.0)
    return max(errors)


def _inputs(part: BaseTunerLayer) -> Tensor | None:
    """A few fixed inputs that tell whether a layer's weights are right; None for a kind of layer unknown here."""
    base = part.get_base_layer()
    generator = torch.Generator().manual_seed(0)
    if isinstance(part, ParamWrapper):
        weight = part.get_param()
        return torch.randn(*weight.shape[:-2], weight.shape[-1], 2, generator=generator).to(weight.device)
    if isinstance(base, nn.Embedding):
        rows = part.token_indices["default"] if isinstance(part, TrainableTokensLayer) else []
        spread = torch.linspace(0, base.num_embeddings - 1, 16).long()
        return torch.cat([spread, torch.tensor(rows, dtype=torch.int64)]).to(base.weight.device)
    if isinstance(base, nn.Linear | Conv1D):
        width = base.in_features if isinstance(base, nn.Linear) else base.weight.shape[0]
        return torch.randn(4, width, generator=generator).to(base.weight.device)
    return None


def _base_output(part: BaseTunerLayer, x: Tensor | None) -> Any:
    if x is None:
        return None
    return part.get_param() @ x if isinstance(part, ParamWrapper) else part.get_base_layer()(x)


def _adapted_output(part: BaseTunerLayer, x: Tensor | None) -> Any:
    """What the layer gives with its adapter beside it."""
    if x is None:
        return None
    if isinstance(part, ParamWrapper):  # its forward needs a router; these are the factors that it multiplies with
        left, right, scaling = part.get_delta_factors("default")
        return part.get_param() @ x + scaling * (left @ (right @ x))
    return part(x)


def _proof(before: Sequence[Tensor], after: Sequence[Tensor], error: float, dtype: torch.dtype) -> LayerMerge:
    """Sums over the parameters of a layer, one after another."""
    size = change = kept = 0.0
    written = False
    for old, new in zip(before, after, strict=True):
        delta, rounded = new - old, new.to(dtype)
        written = written or not torch.equal(rounded, old.to(dtype))
        size += float(old.square().sum())
        change += float(delta.square().sum())
        kept += float(((rounded.float() - old) * delta).sum())
    return LayerMerge(
        change=(change / size) ** 0.5 if size else 0.0,
        error=error,
        kept=kept / change if change else 1.0,
        written=written,
    )


def require_change(proofs: Mapping[str, LayerMerge], dtype: str) -> None:
    """Raises CheckpointError where a merge leaves the base as it was, in the dtype that is written."""
    if not any(proof.change for proof in proofs.values()):
        raise CheckpointError("merge: the merged model equals the base: the adapter has learned nothing")
    if not any(proof.written for proof in proofs.values()):
        largest = max(proof.change for proof in proofs.values())
        raise CheckpointError(
            f"merge: the adapter changes the weights by {largest:.1e} of their size at most, which is lost in the "
            f"rounding to {dtype}: the merged model would equal the base. Use export.dtype=fp32, or export.merge=false"
        )


def _standalone(module: nn.Module, values: Mapping[int, Tensor]) -> nn.Module:
    """A copy of a module tree over these values, without the hooks of the live one: an engine's would look for its own
    parameters here. A safe merge replaces a parameter's data, so the values stay as they are. Of a 4-bit layer it is
    a plain one over its whole weight: what is merged must not be rounded to 4 bits again."""
    if isinstance(module, nn.Linear) and is_quantised(module.weight):
        twin: nn.Module = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    else:
        twin = copy.copy(module)
        twin.__dict__ = {
            key: copy.copy(value) if isinstance(value, list | set | dict) else value
            for key, value in vars(module).items()
        }
        for hooks in (twin._forward_hooks, twin._forward_pre_hooks):
            hooks.clear()
    own = module._parameters.items()
    twin._parameters = {name: p if p is None else nn.Parameter(values[id(p)], requires_grad=False) for name, p in own}
    children = module._modules.items()
    twin._modules = {name: child if child is None else _standalone(child, values) for name, child in children}
    return twin


def _innermost(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _name_underneath(name: str) -> str:
    """A base parameter's name in the model that PEFT has wrapped."""
    wrappers = {"base_layer", "original_module", "token_adapter"}
    return ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in wrappers)


def save_adapter(model: PeftModel, tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Write `adapter_config.json` in PEFT's own format; returns the adapter's tensors under the names it reads them by.

    Where the base lies in 4 bits, a file beside it says how. `tensors`: the live model's trainable parameters, whole.
    """
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    if not isinstance(config.target_modules, str):  # PEFT keeps a set: in another order in every process
        config.target_modules = sorted(config.target_modules or ())
    # transformers sets it for what came from the Hub: the base that the adapter belongs to, not the newest one
    config.revision = config.revision or getattr(model.get_base_model().config, "_commit_hash", None)
    config.save_pretrained(str(folder))
    if (quantisation := quantisation_of(model)) is not None:  # PEFT's own file has no place for it
        write_json(folder / BASE_QUANTISATION, quantisation)
    state: dict[str, Tensor] = get_peft_model_state_dict(model, dict(tensors), save_embedding_layers=False)
    return state


def require_learned(state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if every lora_B of an adapter's tensors is zero: it changes nothing."""
    if not any(bool(tensor.any()) for name, tensor in state.items() if "lora_B" in name):
        raise CheckpointError("every lora_B of the adapter is zero: it has learned nothing; train it before an export")


def _rows_needed(config: PeftConfig) -> int:
    """Rows of the base that the token rows of an adapter take the place of."""
    targets = config.trainable_token_indices or {}
    return max((max(rows) + 1 for rows in targets.values()), default=0)


def load_adapter(folder: Path, dtype: torch.dtype | str = "auto") -> PeftModel:
    """The adapter in a folder on the base that its `adapter_config.json` names, as PEFT alone loads it; in 4 bits
    where it was trained so.

    Raises CheckpointError for a tensor that is missing or unknown.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not config.base_model_name_or_path:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base: use export.merge=true")
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision, dtype=dtype)
    if (folder / BASE_QUANTISATION).is_file():
        quantise_as(base, read_json(folder / BASE_QUANTISATION))
    if base.get_input_embeddings().weight.shape[0] < (rows := _rows_needed(config)):
        grow_vocabulary(base, rows)
    with _old_question():
        model = PeftModel.from_pretrained(base, str(folder))
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        found = set(file.keys())
    if found != expected:
        raise CheckpointError(
            f"{folder / ADAPTER_FILE}: missing {sorted(expected - found)[:5]}, unknown {sorted(found - expected)[:5]}"
        )
    loaded: PeftModel = model.eval()
    return loaded
