"""What a configuration must fulfil beyond the type of each key: all rules, all at once."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sftdist.core.migrations import version_issue
from sftdist.core.mix import lambda_issue
from sftdist.core.rules_own import own_code_issues
from sftdist.core.settings import (
    CheckpointSettings,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    Init,
    InspectConfig,
    Kernels,
    Method,
    MonitorConfig,
    Offload,
    PlanConfig,
    PrepareConfig,
    TrainConfig,
)
from sftdist.core.typed import shown

# key: the least value; None is always allowed where the schema allows it.
AT_LEAST = {
    "seed": 0,
    "data.max_len": 2,
    "data.max_bad_rows": 0,
    "data.max_refused": 0,
    "data.workers": 0,
    "data.near.shingle": 1,
    "model.vocabulary": 300,
    "model.loss_chunk": 1,
    "model.recompute_layers": 1,
    "tune.r": 1,
    "train.pack_tokens": 2,
    "train.packs_per_step": 1,
    "train.tokens_per_step": 1,
    "train.conversations_per_step": 1,
    "train.max_steps": 1,
    "train.window": 1,
    "optimizer.weight_decay": 0,
    "optimizer.max_grad_norm": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "eval.every_steps": 0,
    "eval.max_conversations": 1,
    "launch.nproc": 1,
    "launch.nodes": 1,
    "launch.node_rank": 0,
    "launch.max_restarts": 0,
    "evals.max_prompts": 1,
    "evals.max_new_tokens": 1,
    "evals.batch_size": 1,
    "evals.robustness_prompts": 1,
    "evals.resamples": 100,
    "gate.min_prompts": 1,
    "to_label_rows": 1,
    "limit": 1,
    "cluster.gpus_per_node": 1,
}
ABOVE_ZERO = (
    *("data.temperature", "data.max_passes", "train.epochs", "tune.alpha", "optimizer.lr", "optimizer.eps"),
    *("checkpoint.grace_seconds", "export.shard_gib"),
    *("cluster.memory_gib", "cluster.network_gbps"),
    *("launch.join_seconds", "launch.lost_seconds", "launch.hang_seconds"),
    "watch_seconds",
)
# key: whether 1 itself is allowed
FRACTIONS = {
    "data.val_fraction": False,
    "data.holdout_fraction": False,
    "data.near.threshold": True,
    "tune.dropout": False,
    "optimizer.momentum": False,
    "optimizer.warmup_ratio": True,
    "optimizer.min_lr_ratio": True,
    "evals.confidence": False,
    "gate.confidence": False,
}
WORDS = {
    "output": ("terminal", "html", "jsonl"),
    "lock": ("write", "extend", "withdraw"),
    "split": ("validation", "holdout"),
}
PROFILED = 50  # steps
PLAN_OUTPUT = ("terminal", "json")
PLAN_FILES = (".html", ".svg", ".json")
STEP_SIZES = ("train.packs_per_step", "train.tokens_per_step", "train.conversations_per_step")
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):\d{1,5}")
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Prompts that an evaluation brings along, and sums over all: the first word of a metric's name, as that of a source is.
BROUGHT_ALONG = ("adversarial", "all", "benchmarks", "robustness", "safety")


def check(cfg: TrainConfig, *, complete: bool = True) -> list[str]:
    """Every issue of a configuration that has passed the schema, one line each; empty where it can be run.

    `complete=False` leaves out what may still come as objects in memory: data, model and tokenizer.
    """
    if issue := version_issue(cfg.config_version):
        return [issue]
    issues = [*_ranges(cfg), *_words(cfg), *_sources(cfg), *_model(cfg), *_run(cfg), *_nodes(cfg)]
    issues += own_code_issues(cfg)
    if complete and not isinstance(cfg, MonitorConfig):  # a release brings its model and its figures along
        issues += _completeness(cfg)
    if not isinstance(cfg, DataConfig):
        issues += [*_steps(cfg), *_engine(cfg), *_checkpoints(cfg)]
    return issues


def _read(cfg: TrainConfig, key: str) -> Any:
    """The value at a dotted key, or None where this command has no such key."""
    try:
        return operator.attrgetter(key)(cfg)
    except AttributeError:
        return None


def _ranges(cfg: TrainConfig) -> Iterator[str]:
    for key, least in AT_LEAST.items():
        value = _read(cfg, key)
        if value is not None and value < least:
            yield f"{key}: given {value}, required at least {least}"
    for key in ABOVE_ZERO:
        value = _read(cfg, key)
        if value is not None and value <= 0:
            yield f"{key}: given {value:g}, required a number above 0"
    for key, one_too in FRACTIONS.items():
        value = _read(cfg, key)
        if not (0 <= value <= 1 if one_too else 0 <= value < 1):
            yield f"{key}: given {value:g}, required a fraction from 0 to {'1' if one_too else 'below 1'}"
    if cfg.data.val_fraction + cfg.data.holdout_fraction >= 1:
        yield "data.val_fraction and data.holdout_fraction sum to 1 or more: nothing is left to train on; lower them"
    betas = cfg.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optimizer.betas: given {betas}, required two numbers from 0 to below 1, such as [0.9,0.95]"


def _words(cfg: TrainConfig) -> Iterator[str]:
    for key, words in WORDS.items():
        value = _read(cfg, key)
        words = PLAN_OUTPUT if key == "output" and isinstance(cfg, PlanConfig) else words
        if value is not None and value not in words:
            yield f"{key}: given {shown(value)}, required one of {', '.join(words)}"
    if isinstance(cfg, PlanConfig):
        yield from _cluster(cfg)
    if isinstance(cfg, PrepareConfig) and cfg.lock is not None and cfg.data.holdout_lock is None:
        yield f"lock: given {shown(cfg.lock)} without data.holdout_lock; say which file: data.holdout_lock=FILE.json"
    if isinstance(cfg, InspectConfig):
        yield from _inspect(cfg)
    if isinstance(cfg, ExportConfig) and cfg.step not in ("latest", "best") and not cfg.step.isdecimal():
        yield f"step: given {shown(cfg.step)}, required latest, best or the number of a step"
    target = cfg.tune.target
    is_names = isinstance(target, list) and target and all(isinstance(name, str) for name in target)
    if not is_names and target != "all-linear":
        yield f"tune.target: given {shown(target)}, required all-linear or a list such as [q_proj,v_proj]"


def _cluster(cfg: PlanConfig) -> Iterator[str]:
    gpus = cfg.cluster.gpus
    counts = gpus if isinstance(gpus, list) else [gpus]
    if not counts or not all(type(count) is int and count >= 1 for count in counts):
        yield f"cluster.gpus: given {shown(gpus)}, required a number of at least 1, or a list such as [8,64,512]"
    if cfg.file is not None and not cfg.file.endswith(PLAN_FILES):
        yield f"file: given {shown(cfg.file)}, required a name that ends with {', '.join(PLAN_FILES)}"


def _sources(cfg: TrainConfig) -> Iterator[str]:
    sources = cfg.data.sources
    for name, source in sources.items():
        if not SOURCE_NAME.fullmatch(name):
            yield f"data.sources: given the name {name!r}, required letters, digits, '_', '-' and '.'"
        if name.partition(".")[0] in BROUGHT_ALONG:
            yield f"data.sources: given the name {name!r}, which the evaluation uses for its own; choose another"
        if not _is_path(source.path):
            forms = "a file, a glob, a folder, a list of those, or hub:NAME"
            yield f"data.sources.{name}.path: given {shown(source.path)}, required {forms}"
        if source.lam is not None and (issue := lambda_issue(name, source.lam)):
            yield f"data.sources.{name}.lam: {issue}"
        if source.max_passes is not None and source.max_passes <= 0:
            yield f"data.sources.{name}.max_passes: given {source.max_passes:g}, required a number above 0"
    given = [name for name, source in sources.items() if source.lam is not None]
    without = [name for name in sources if name not in given]
    if given and without:
        yield (
            f"data.sources: {', '.join(given)} have a lam and {', '.join(without)} have none; "
            "give every source one (data.mix=...), or none for their natural shares"
        )
    elif given and sum(source.lam or 0.0 for source in sources.values()) <= 0:
        yield "data.sources: the lambdas sum to 0; at least one source needs a lam above 0"
    if cfg.data.temperature is not None and given:
        yield "data.temperature: it sets the shares where no lambda is given; remove it, or set every lam to null"


def _is_path(path: Any) -> bool:
    if isinstance(path, list):
        return bool(path) and all(isinstance(part, str) and part for part in path)
    return isinstance(path, str) and bool(path)


def _inspect(cfg: InspectConfig) -> Iterator[str]:
    """`step` is one of the plan, or with `worst` that of a checkpoint."""
    named = ("latest", "best") if cfg.worst is not None else ()
    if cfg.step is not None and cfg.step not in named and not cfg.step.isdecimal():
        yield f"step: given {shown(cfg.step)}, required {''.join(f'{name}, ' for name in named)}the number of a step"
    if cfg.worst is not None and cfg.worst < 1:
        yield f"worst: given {cfg.worst}, required 1 or more rows"


def _model(cfg: TrainConfig) -> Iterator[str]:
    model = cfg.model
    if model.vocabulary is not None and model.tokenizer is not None:
        yield "model.vocabulary trains a tokenizer and model.tokenizer gives one; keep one of the two"
    if model.vocabulary is not None and model.init == Init.pretrained and not isinstance(cfg, DataConfig):
        yield (
            "model.vocabulary trains a new tokenizer, which pretrained weights do not know; "
            "set model.init=random or model.vocabulary=null"
        )
    if model.shape is not None and "model_type" not in model.shape:
        yield "model.shape: no model_type; required a transformers config with it, such as {model_type:llama,...}"
    if model.recompute_layers is not None and not model.activation_checkpointing:
        yield (
            f"model.recompute_layers: given {model.recompute_layers}, but nothing is recomputed; "
            "set model.activation_checkpointing=true, or remove it"
        )
    if model.compile and model.kernels == Kernels.liger:
        yield (
            "model.kernels: given liger with model.compile=true, which fuses the layers itself and cannot look into "
            "liger's kernels; set model.kernels=auto, or model.compile=false"
        )


def _completeness(cfg: TrainConfig) -> Iterator[str]:
    model, inspecting = cfg.model, isinstance(cfg, DataConfig)
    if isinstance(cfg, EvaluateConfig):
        yield from _to_evaluate(cfg)
        return
    if not cfg.data.sources:
        yield "data: no source is given; give data.train=FILE, or data.sources.NAME.path=FILE for each source"
    if not inspecting and model.init == Init.pretrained and model.path is None:
        yield "model.path: not given; give a model's folder or hub name, or model.init=random with a model.shape"
    if not inspecting and model.init == Init.random and model.path is None and model.shape is None:
        yield "model.init=random: no shape is given; give model.shape (or model=NAME), or model.path for its shape"
    if model.path is None and model.tokenizer is None and model.vocabulary is None:
        yield "model.tokenizer: not given; give model.path, model.tokenizer, or model.vocabulary=N to train one"


def _to_evaluate(cfg: EvaluateConfig) -> Iterator[str]:
    """Which model it is, the command itself says: a run brings all of this along."""
    key, file = ("data.val", cfg.data.val) if cfg.split == "validation" else ("data.holdout", cfg.data.holdout)
    named = cfg.candidate or cfg.model.path
    if named and not cfg.data.sources and not file and cfg.evals.probes != ["benchmarks"]:
        yield f"{key}: not given; without a run required are the conversations to ask: {key}=FILE"


def _steps(cfg: TrainConfig) -> Iterator[str]:
    train = cfg.train
    sizes = [key for key in STEP_SIZES if _read(cfg, key) is not None]
    if len(sizes) != 1:
        given = " and ".join(sizes) or "none"
        yield f"train: the step size is given by {given}, required exactly one of {', '.join(STEP_SIZES)}"
    if train.epochs is None and train.max_steps is None:
        yield "train: neither epochs nor max_steps is given; set train.epochs=N or train.max_steps=N"
    pack = train.pack_tokens
    if pack is not None and train.packing and pack < cfg.data.max_len:
        yield (
            f"train.pack_tokens: given {pack}, required at least data.max_len={cfg.data.max_len}; "
            f"set data.max_len={pack} or train.pack_tokens={cfg.data.max_len}"
        )
    pack = pack or cfg.data.max_len
    if train.tokens_per_step is not None and train.tokens_per_step < pack:
        yield f"train.tokens_per_step: given {train.tokens_per_step}, required at least one pack, {pack} tokens"
    yield from _profile(train.profile)


def _profile(steps: Sequence[int]) -> Iterator[str]:
    """A trace takes some MiB for a step of a small model, some hundred for a large one."""
    if not steps:
        return
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
        yield f"train.profile: given {shown(steps)}, required [FIRST,LAST], two steps counted from 1, as in [10,12]"
    elif steps[1] - steps[0] >= PROFILED:
        yield f"train.profile: given {steps[1] - steps[0] + 1} steps, required at most {PROFILED}: a trace is large"


def _engine(cfg: TrainConfig) -> Iterator[str]:
    stage, offload = cfg.zero.stage, cfg.zero.offload
    if stage not in (0, 1, 2, 3):
        yield f"zero.stage: given {stage}, required 0, 1, 2 or 3"
    if stage == 0 and offload != Offload.none:
        yield f"zero.offload: given {offload} with zero.stage=0, which offloads nothing; set zero.stage=2"
    if cfg.tune.method != Method.full and cfg.tune.dora and stage == 3:
        yield "tune.dora=true with zero.stage=3: DoRA needs whole weights on each rank; set zero.stage=2"
    if cfg.model.compile and stage == 3:
        yield (
            "model.compile=true with zero.stage=3: parameters are gathered by hooks inside of the layers, which leave "
            "no graph whole; set zero.stage=2, or model.compile=false"
        )
    if cfg.tune.method == Method.full and (cfg.tune.dora or cfg.tune.rslora):
        yield "tune.dora and tune.rslora are kinds of LoRA; set tune.method=lora or remove them"
    if cfg.tune.method != Method.qlora and not cfg.tune.double_quant:
        yield (
            f"tune.double_quant: given false with tune.method={cfg.tune.method}, which quantises nothing; set "
            "tune.method=qlora, or remove it"
        )


def _checkpoints(cfg: TrainConfig) -> Iterator[str]:
    save, evaluate = cfg.checkpoint.every_steps, cfg.eval.every_steps
    by_loss = cfg.checkpoint.keep_best and cfg.checkpoint.best == CheckpointSettings().best
    if by_loss and not (save > 0 and evaluate > 0 and evaluate % save == 0):
        yield (
            f"checkpoint.keep_best: given eval.every_steps={evaluate} and checkpoint.every_steps={save}, required that "
            "every evaluated step has a checkpoint; set checkpoint.every_steps to a divisor of eval.every_steps"
        )


def _nodes(cfg: TrainConfig) -> Iterator[str]:
    launch = cfg.launch
    if launch.nodes == 1:
        return  # what the other keys say does not matter: the same line runs on one node, too
    if launch.address is None or not ADDRESS.fullmatch(launch.address):
        yield (
            f"launch.address: given {shown(launch.address)} with launch.nodes={launch.nodes}, required HOST:PORT of "
            "the first node, such as 10.0.0.1:29500, the same on every node"
        )
    if launch.node_rank is not None and launch.node_rank >= launch.nodes:
        yield f"launch.node_rank: given {launch.node_rank}, required 0 to {launch.nodes - 1} (launch.nodes - 1)"


def _run(cfg: TrainConfig) -> Iterator[str]:
    name = cfg.run.name
    if name is not None and (not name or name != name.strip() or "/" in name or name.startswith(".")):
        yield (
            f"run.name: given {shown(name)}, required a name without '/' and without spaces around it that does not "
            "begin with '.'"
        )
