"""The model and its engine, built from plain settings: what is trained, on which backend, with which optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from sftdist.core.distributed import World
from sftdist.core.extension import require_same_code
from sftdist.core.settings import Init, Method, Offload, TrainConfig
from sftdist.core.settings import Kernels as KernelChoice
from sftdist.data.corpus import Corpus, validation_sources
from sftdist.data.new_tokens import ids_of
from sftdist.data.planned import pack_tokens
from sftdist.data.template import ChatTemplate
from sftdist.model import cost
from sftdist.model.attention import Choice, choose
from sftdist.model.compiled import compile_layers
from sftdist.model.config import load_config
from sftdist.model.kernels import Kernels, choose_kernels
from sftdist.model.load import begin_rows, is_tied, load_model
from sftdist.model.lora import Coverage, LoraSpec, attach, untrained_rows
from sftdist.model.loss import LossModel, RowLosses, TokenLoss, token_ce
from sftdist.model.own_loss import load_loss, require_sound, rows_of
from sftdist.model.quantised import quantise, require_quantisation
from sftdist.model.text_part import outside_text
from sftdist.training.engine import Engine, gathered, partitioned_init
from sftdist.training.optimizer import OptimizerSpec
from sftdist.training.zero_config import COMPUTE_DTYPE, EngineSpec


@dataclass(frozen=True)
class Trained:
    """A model under an engine. `coverage`: what the adapter reaches, None in a full fine-tune. `untrained`: ids of
    template and new tokens whose rows the base model never trained. `tied`: head and embeddings are one parameter.
    `commit`: of the Hub repository that the weights came from. `outside_text`: names of frozen parameters that no text
    passes through."""

    engine: Engine
    config: PreTrainedConfig
    attention: Choice
    kernels: Kernels
    coverage: Coverage | None
    untrained: tuple[int, ...]
    tied: bool
    commit: str | None
    outside_text: tuple[str, ...]


def new_token_ids(cfg: TrainConfig, template: ChatTemplate) -> tuple[int, ...]:
    """Ids of `model.add_tokens` that the base's own tokenizer does not know: an earlier run's export knows them, and
    its rows stay as they were trained."""
    if not cfg.model.add_tokens or cfg.model.init == Init.random:
        return ()
    known = AutoTokenizer.from_pretrained(
        cfg.model.tokenizer or cfg.model.path, revision=cfg.model.revision
    ).get_vocab()
    numbers = ids_of(template.tokenizer, cfg.model.add_tokens)
    return tuple(sorted(number for token, number in numbers.items() if token not in known))


def model_config(cfg: TrainConfig, tokens: int, special: dict[str, int | None]) -> PreTrainedConfig:
    """The model's config. A model from random weights takes its vocabulary and special ids from the tokenizer."""
    shape = cfg.model.shape
    if cfg.model.init == Init.pretrained or shape is None:
        return load_config(cfg.model.path, cfg.model.revision, None)
    rows = max(int(shape.get("vocab_size", 0)), tokens)
    shape = {**shape, "vocab_size": rows, **{name: value for name, value in special.items() if value is not None}}
    return load_config(None, None, shape)


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_trained(cfg: TrainConfig, corpus: Corpus, config: PreTrainedConfig, world: World) -> Trained:
    """Load or initialise the model, attach what trains, and hand it to the engine. Collective under ZeRO 3."""
    require_same_code(cfg)
    spec = engine_spec(cfg)
    dtype = COMPUTE_DTYPE[spec.precision]
    attention = choose(cfg.model.attention.value, world.device, dtype, config)
    kernels = choose_kernels(cfg.model.kernels.value, world.device, config, compiled=cfg.model.compile)
    four_bits = cfg.tune.method == Method.qlora
    if four_bits:
        require_quantisation(world.device, dtype)
    # Random weights drawn into partitions would not be those of the other stages.
    # Neither can 4 bits be made of parts.
    from_files = cfg.model.init == Init.pretrained
    new_ids = new_token_ids(cfg, corpus.template)
    partitioned = partitioned_init(spec, world) if from_files and not four_bits else None
    model = load_model(
        config=config,
        path=cfg.model.path,
        revision=cfg.model.revision,
        init=cfg.model.init.value,
        seed=cfg.seed,
        # What trains in full starts from float32; a base that only adapters train beside is read as it computes.
        dtype=dtype if four_bits and from_files else torch.float32,
        attention=attention.name,
        activation_checkpointing=cfg.model.activation_checkpointing,
        recompute_layers=cfg.model.recompute_layers,
        liger=kernels.layers == "liger",
        vocab_rows=1 + max([corpus.largest_id, *new_ids]),
        partitioned_init=partitioned,
    )
    untrained: tuple[int, ...] = ()
    if from_files:
        begin_rows(model, new_ids, partial(gathered, modifier=0))
        found = untrained_rows(model, corpus.template.used_token_ids(), gathered)
        untrained = tuple(sorted({*found, *new_ids}))
    tied, coverage, outside = is_tied(model), None, tuple(outside_text(model))
    module: Any = model
    if four_bits:
        quantise(model, double_quant=cfg.tune.double_quant, dtype=dtype, device=world.device, floating=spec.stage == 3)
    if cfg.tune.method != Method.full:
        torch.manual_seed(cfg.seed)  # the adapter starts from the same numbers on every rank and in every run
        module, coverage = attach(model, lora_spec(cfg), train_rows=untrained)
    torch.manual_seed(cfg.seed + world.rank)  # dropout differs between ranks, and not between runs
    commit = getattr(config, "_commit_hash", None)  # transformers sets it for what came from the Hub
    if cfg.model.compile:
        compile_layers(module)
    sources = max(len(corpus.stores), len(validation_sources(corpus)))
    row_losses, token_loss = losses_of(cfg, kernels, corpus.largest_id + 1)
    loss = LossModel(
        module, num_sources=sources, chunk=cfg.model.loss_chunk, row_losses=row_losses, token_loss=token_loss
    )
    engine = Engine(loss, optimizer_spec(cfg), spec, world)
    # The model's own config: where the vocabulary grew, it is not the one that was asked for.
    return Trained(engine, model.config, attention, kernels, coverage, untrained, tied, commit, outside)


def memory_setup(cfg: TrainConfig, *, stage: int, world: int, trainable: int | None, device: str) -> cost.Setup:
    """The choices of a configuration that memory depends on. `trainable`: of an adapter, None in a full fine-tune.
    `device`: cuda or cpu."""
    return cost.Setup(
        stage=stage,
        world=world,
        pack_tokens=pack_tokens(cfg),
        precision=cfg.precision.value,
        trainable=trainable,
        checkpointing=cfg.model.activation_checkpointing,
        offload=cfg.zero.offload != Offload.none and stage > 0,
        loss_chunk=cfg.model.loss_chunk,
        moments=len(optimizer_spec(cfg).moments),
        recompute_layers=cfg.model.recompute_layers,
        quantised=cfg.tune.method == Method.qlora,
        double_quant=cfg.tune.double_quant,
        device=device,
        fused_loss=device == "cuda" and cfg.model.kernels != KernelChoice.torch,
    )


def planned_trainable(cfg: TrainConfig, shape: Mapping[str, Any]) -> int | None:
    """Parameters that an adapter will train, None in a full fine-tune."""
    return None if cfg.tune.method == Method.full else cost.lora_parameters(shape, cfg.tune.r)


def losses_of(cfg: TrainConfig, kernels: Kernels, vocabulary: int) -> tuple[RowLosses, TokenLoss]:
    """Cross-entropy on the kernel that was chosen, or the loss that the configuration names, proven."""
    if cfg.train.loss is None:
        return kernels.row_losses, token_ce
    own = load_loss(cfg.train.loss, cfg.train.loss_args)
    require_sound(own, cfg.train.loss, vocabulary)
    return rows_of(own), own


def engine_spec(cfg: TrainConfig) -> EngineSpec:
    return EngineSpec(
        stage=cfg.zero.stage,
        precision=cfg.precision.value,
        offload=cfg.zero.offload.value,
        max_grad_norm=cfg.optimizer.max_grad_norm,
        extra=cfg.zero.deepspeed,
    )


def optimizer_spec(cfg: TrainConfig) -> OptimizerSpec:
    return OptimizerSpec(
        name=cfg.optimizer.name,
        betas=(cfg.optimizer.betas[0], cfg.optimizer.betas[1]),
        eps=cfg.optimizer.eps,
        momentum=cfg.optimizer.momentum,
        weight_decay=cfg.optimizer.weight_decay,
        lr=cfg.optimizer.lr,
        args=cfg.optimizer.args,
    )


def lora_spec(cfg: TrainConfig) -> LoraSpec:
    return LoraSpec(
        r=cfg.tune.r,
        alpha=cfg.tune.alpha,
        dropout=cfg.tune.dropout,
        rslora=cfg.tune.rslora,
        dora=cfg.tune.dora,
        target=cfg.tune.target,
    )
