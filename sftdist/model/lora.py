"""Low-rank adapters through PEFT (the only import of it): what trains, token rows included, and the proven merge.

LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, DoRA https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sftdist.core.errors import CheckpointError, ConfigError
from sftdist.model.backends.interface import Documents
from sftdist.model.load import is_tied

ALL_LINEAR = "all-linear"
MERGE_TOLERANCE = 1e-4  # of the largest logit; a merge is made and compared in float32
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
class MergeProof:
    """`error`: logits of merged against base + adapter, as a share of the largest; `moved`: against the base, likewise.

    `deltas`: per layer the norm of the change over the norm of the weight.
    """

    error: float
    moved: float
    deltas: dict[str, float]


def attach(model: PreTrainedModel, spec: LoraSpec, *, train_rows: Sequence[int] = ()) -> tuple[PeftModel, Coverage]:
    """Freeze the model and add adapters; `train_rows` are token rows of embeddings and head that train in full.

    Raises ConfigError if a target matches nothing, or token rows cannot be trained on this engine.
    """
    experts, not_reached = _experts(model, spec)
    _refuse_partitioned_rows(model, train_rows)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=spec.r,
        lora_alpha=spec.alpha,  # PEFT only divides by it: a fraction is as good as an integer
        lora_dropout=spec.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores weights transposed
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=_linear_names(model) if spec.target == ALL_LINEAR else list(spec.target),
        target_parameters=experts or None,
        trainable_token_indices=_row_targets(model, train_rows) or None,
    )
    try:
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


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Names that match every linear layer but the head: the short ones (q_proj, ...) where they are unambiguous.

    PEFT's own "all-linear" also rewrites the targets of some mixtures of experts; here the report must know them.
    """
    head = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    inside = [name for name, module in names.items() if module is not head]
    short = {name.rsplit(".", 1)[-1] for name in inside}
    outside = {name.rsplit(".", 1)[-1] for name, module in names.items() if module is head}
    return sorted(inside if short & outside else short)


def _experts(model: PreTrainedModel, spec: LoraSpec) -> tuple[list[str], list[str]]:
    """Names of fused expert weights that "all-linear" reaches, and lines about those that it does not.

    They are 3-D parameters (experts, in, out), no linear layers: PEFT knows them as `target_parameters`.
    """
    fused = [name for name, parameter in model.named_parameters() if len(_shape(parameter)) == 3]
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
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 partitions have the shape [0]


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
    matrices = [model.get_input_embeddings().weight]
    matrices += [] if is_tied(model) else [model.get_output_embeddings().weight]
    found: set[int] = set()
    for matrix in matrices:
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


def merge(model: PeftModel) -> tuple[PreTrainedModel, MergeProof]:
    """Merge the adapters into the base weights in float32, in place, and prove it on a fixed row of tokens.

    Raises CheckpointError if the merged model is not base + adapter, or is still the base.
    """
    model.float().eval()
    adapted = _logits(model)
    with model.disable_adapter():
        base = _logits(model)
    deltas = {name: _merge_layer(layer) for name, layer in _adapter_layers(model)}
    merged = model.base_model.unload()
    result = _logits(merged)
    largest = adapted.abs().max()
    proof = MergeProof(
        error=((result - adapted).abs().max() / largest).item(),
        moved=((result - base).abs().max() / largest).item(),
        deltas=deltas,
    )
    if not proof.error <= MERGE_TOLERANCE:
        raise CheckpointError(
            f"merge: the merged logits differ from base + adapter by {proof.error:.3g} of the largest "
            f"(allowed: {MERGE_TOLERANCE:g}): export the adapter alone with export.merge=false"
        )
    if proof.moved == 0.0:
        raise CheckpointError("merge: the merged model equals the base; the adapter has learned nothing")
    return merged, proof


def _merge_layer(layer: BaseTunerLayer) -> float:
    """Merge one layer; return by how much its weights changed, relative to their norm."""
    before = [parameter.detach().clone() for parameter in _base_weights(layer)]
    layer.merge(safe_merge=True)
    change = sum((new - old).square().sum() for new, old in zip(_base_weights(layer), before, strict=True))
    return float((change / sum(old.square().sum() for old in before)) ** 0.5)


def _base_weights(layer: BaseTunerLayer) -> list[Tensor]:
    return [parameter.detach() for parameter in layer.get_base_layer().parameters(recurse=False)]


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Logits of a fixed row of tokens, spread over the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    device = next(model.parameters()).device
    ids = torch.linspace(0, rows - 1, 24).long().to(device)
    documents = Documents.of_lengths([len(ids)], device)
    output = model(input_ids=ids[None], use_cache=False, **documents.model_arguments())
    logits: Tensor = output.logits[0].float()
    return logits


def merged_parameters(model: PeftModel, full: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model underneath, its name there and its merged float32 value, one layer at a time.

    The model stays as it is, partitioned or not: `full(name)` gives the whole float32 value of one of its parameters,
    the same calls in the same order on every rank.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[int, nn.Module] = {}
    adapters: set[int] = set()
    for _, layer in _adapter_layers(model):
        base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        adapters |= {id(parameter) for parameter in layer.parameters()} - base
        for index in base:
            owners.setdefault(index, layer)  # the outermost layer comes first, and holds the others
    merged: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters():
        index = id(parameter)
        if index in adapters:
            continue
        if index in owners and index not in merged:
            merged |= _merged_copy(owners[index], lambda index: full(names[index]))
        yield _name_underneath(name), merged.pop(index) if index in merged else full(name)


def _merged_copy(layer: nn.Module, full: Callable[[int], Tensor]) -> dict[int, Tensor]:
    """The merged weights of a layer by the identity of the live ones; merged by PEFT in a copy of the layer."""
    values = {id(parameter): full(id(parameter)) for parameter in layer.parameters()}
    standalone = _standalone(layer, values)
    for _, part in _adapter_layers(standalone):
        part.merge(safe_merge=True)
    live = [id(parameter) for parameter in _innermost(layer).parameters()]
    return dict(zip(live, (p.detach() for p in _innermost(standalone).parameters()), strict=True))


def _standalone(module: nn.Module, values: Mapping[int, Tensor]) -> nn.Module:
    """A copy of a module tree with these values for its parameters; hooks of the live one act on nothing here."""
    twin = copy.copy(module)
    twin.__dict__ = {
        key: copy.copy(value) if isinstance(value, list | set | dict) else value for key, value in vars(module).items()
    }
    own = module._parameters.items()
    twin._parameters = {
        name: p if p is None else nn.Parameter(values[id(p)].clone(), requires_grad=False) for name, p in own
    }
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

    `tensors`: the trainable parameters of the live model, whole. Raises CheckpointError if all of an adapter is zero.
    """
    model.peft_config["default"].save_pretrained(str(folder))
    state: dict[str, Tensor] = get_peft_model_state_dict(model, dict(tensors), save_embedding_layers=False)
    if not any(bool(tensor.any()) for name, tensor in state.items() if "lora_B" in name):
        raise CheckpointError("every lora_B of the adapter is zero: it has learned nothing; train it before an export")
    return state
