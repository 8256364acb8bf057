"""A causal language model from a folder, the Hub or a bare shape, bound to our attention.

Memory: `from_pretrained` reads a checkpoint shard by shard on every rank, through memory maps. Inside
`partitioned_init` (ZeRO-3) only rank 0 reads the files, and each rank keeps its share of every weight;
without it each rank holds the whole model in host memory until the engine takes it over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sftdist.core.errors import CheckpointError, ConfigError, StartupError
from sftdist.core.storage import sha256_file
from sftdist.model.attention import register
from sftdist.model.kernels import use_layer_kernels
from sftdist.model.text_part import causal_lm, decoder_of, freeze_outside_text

ROW_MULTIPLE = 64
Whole = AbstractContextManager[object]


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by file name of the weights in a model's folder; nothing where there is no such folder."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {file.name: sha256_file(file) for file in files}


def load_model(
    *,
    config: PreTrainedConfig,
    path: str | None,
    revision: str | None = None,
    init: str = "pretrained",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str,
    activation_checkpointing: bool = False,
    recompute_layers: int | None = None,
    liger: bool = False,
    vocab_rows: int | None = None,
    partitioned_init: AbstractContextManager[Any] | None = None,
) -> PreTrainedModel:
    """A causal language model in `dtype` on the CPU (partitioned inside `partitioned_init`), ready for packed rows;
    what no text passes through is frozen.

    `attention` is the name of a backend (`attention.choose`); `liger` says that Liger's kernels were chosen for the
    layers (`kernels.choose_kernels`); `recompute_layers` as in `enable_checkpointing`. `vocab_rows` is the number of
    token ids in use: a vocabulary that is smaller grows (`grow_vocabulary`), and none is ever cut. Raises ConfigError
    for a folder that is no causal language model, StartupError if tied weights are not what the config says.
    """
    if init == "pretrained" and path is None:
        raise ConfigError("model.init=pretrained needs model.path; set model.path, or model.init=random")
    rows = config.get_text_config(decoder=True).vocab_size
    grows = vocab_rows is not None and vocab_rows > rows
    # Growing is done before the weights are partitioned: a partitioned matrix has no rows to append to.
    context = nullcontext() if grows or partitioned_init is None else partitioned_init
    settings = {"attn_implementation": register(attention), "dtype": dtype}
    try:
        with context:
            if init == "pretrained":
                model = AutoModelForCausalLM.from_pretrained(path, revision=revision, config=config, **settings)
            else:
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, **settings)
    except KeyError as error:
        raise ConfigError(
            f"{config.model_type} does not take its attention from transformers' registry (unknown to it: {error}); "
            "this model cannot be trained here: choose one that does"
        ) from error
    _keep_names_of_files(model)
    if grows and vocab_rows is not None:
        grow_vocabulary(model, vocab_rows)
    assert_tied_as_configured(model)
    freeze_outside_text(model)
    if liger:
        use_layer_kernels(model)
    if activation_checkpointing:
        enable_checkpointing(model, layers=recompute_layers)
    model.train()
    return model


def _keep_names_of_files(model: PreTrainedModel) -> None:
    """Under ZeRO 3 transformers keeps every renaming that it knows for saving, not those alone that loading took: a
    tensor would be written under a name that the checkpoint never had."""
    renamed = getattr(model, "_weight_conversions", None)  # transformers' own, on what came from files
    if renamed:
        model._weight_conversions = [conversion for conversion in renamed if conversion.was_used()]


def load_strictly(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of a folder by `from_pretrained`, to be asked and not to be trained.

    Raises CheckpointError for a tensor that is missing, unknown or of another shape.
    """
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}")
    loaded: PreTrainedModel = model.eval()
    return loaded


def grow_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Append rows to the embeddings and the head, until there are `rows` at least and a multiple of 64, which tensor
    cores take whole; each new row is the mean of the old ones."""
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, pad_to_multiple_of=ROW_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[old:] = module.weight[:old].mean(dim=0)


@torch.no_grad()
def begin_rows(model: PreTrainedModel, ids: Sequence[int], whole: Callable[[nn.Parameter], Whole]) -> None:
    """Give the rows of new tokens, in embeddings and head, the mean of the rows before them.

    A padded vocabulary has a row for them that means nothing. `whole` makes a partitioned weight whole and writes back.
    """
    if not ids:
        return
    for matrix in token_matrices(model):
        with whole(matrix):
            matrix[list(ids)] = matrix[: min(ids)].mean(dim=0)


def token_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """[rows, width] each: the embeddings, and a head of its own."""
    modules = [model.get_input_embeddings()]
    modules += [] if is_tied(model) else [model.get_output_embeddings()]
    return [module.weight for module in modules]


def enable_checkpointing(model: PreTrainedModel, *, reentrant: bool = False, layers: int | None = None) -> None:
    """Recompute activations layer by layer in the backward pass: of the first `layers` layers, or of all.

    The first, not some spread over the depth: the backward comes to the last layers first and frees what they kept, so
    that nothing of it is left when the first layer is recomputed, which needs the memory of a whole layer once more.
    The non-reentrant variant is the default. The reentrant one needs an input that requires a gradient, which
    a frozen embedding does not give: under LoRA every adapter of the checkpointed layers would stay at zero.
    Raises ConfigError where the model has fewer layers, or does not say what its layers are.
    """
    # its name before transformers 5.18, which calls it deprecated now
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    if layers is None:
        return
    found = decoder_layers(model)
    if not layers <= len(found):
        raise ConfigError(
            f"model.recompute_layers={layers}: {model.config.model_type} has {len(found)} layers that can be "
            f"recomputed; give at most {len(found)}, or leave it out to recompute all"
        )
    for layer in found[layers:]:
        layer.gradient_checkpointing = False


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that text passes through in their order, as transformers marks them."""
    decoder = decoder_of(causal_lm(model))
    return [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def is_tied(model: PreTrainedModel) -> bool:
    """True if head and embeddings are one parameter, by identity: equal values or addresses prove nothing."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def assert_tied_as_configured(model: PreTrainedModel) -> None:
    """Raise StartupError where `tie_word_embeddings` and the parameters disagree."""
    said = bool(model.config.get_text_config(decoder=True).tie_word_embeddings)
    if is_tied(model) != said:
        raise StartupError(
            f"the config says tie_word_embeddings={said}, but head and embeddings are "
            f"{'one parameter' if is_tied(model) else 'two parameters'}: correct tie_word_embeddings in the "
            "model's config.json"
        )
