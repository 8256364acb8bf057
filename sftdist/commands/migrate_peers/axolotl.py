"""Axolotl's YAML (its schema, version 0.19), and keys of earlier versions that its examples still carry."""

from __future__ import annotations

from pathlib import Path

from sftdist.commands.migrate_peers.account import Account, Kind, is_on, mapping, number
from sftdist.commands.migrate_peers.adapting import (
    alpha,
    bits,
    further_weights,
    of_adapters,
    rank,
    target,
)
from sftdist.commands.migrate_peers.axolotl_data import datasets, test_datasets, validation_share
from sftdist.commands.migrate_peers.axolotl_others import OTHERS
from sftdist.commands.migrate_peers.engine import compilation, deepspeed, fsdp, precision, recomputation
from sftdist.commands.migrate_peers.new_tokens import add_special_tokens, new_tokens
from sftdist.commands.migrate_peers.optimizing import learning
from sftdist.commands.migrate_peers.reporting import output_dir, run_name
from sftdist.commands.migrate_peers.rule import HELD_OUT, NONE, Peer, Rule, same
from sftdist.commands.migrate_peers.stepping import duration, evaluating, length, overlong, saving, seed, step_size

_ADDED = "additional_special_tokens"
OWN_TEMPLATES = ("chatml", "llama3")  # those that the package brings


def _text(key: str, value: object) -> str:
    return str(value)


def _has_adapter(account: Account) -> bool:
    return str(account.get("adapter")) in ("lora", "qlora")


def _adapter() -> Rule:
    def apply(account: Account) -> None:
        method = str(account.get("adapter", "full"))
        if method in ("lora", "qlora"):
            account.carry("adapter", "tune.method", method)
        elif account.has("adapter"):
            account.left("adapter", f"given {method}; LoRA and QLoRA are what there is: tune.method=lora is taken")
            account.put("tune.method", "lora", f"instead of {method}")
        else:
            account.put("tune.method", "full", "no adapter is given")

    return Rule(("adapter",), "tune.method", "lora, qlora; without it full", apply)


def _chat_template() -> Rule:
    def apply(account: Account) -> None:
        name, text = account.get("chat_template"), account.get("chat_template_jinja")
        if text is not None:
            _jinja(account, str(text))
        elif name in (None, "tokenizer_default"):
            if name:
                account.note(Kind.carried, "chat_template", "the tokenizer's own is what is taken")
        elif name in OWN_TEMPLATES:
            account.carry("chat_template", "model.chat_template", name)
        else:
            account.differs(
                "chat_template", f"given {name}; the tokenizer's own is taken: model.chat_template=FILE for another"
            )

    about = "chatml and llama3; else the tokenizer's own, or a file"
    return Rule(("chat_template", "chat_template_jinja"), "model.chat_template", about, apply)


def _jinja(account: Account, text: str) -> None:
    if account.has("chat_template"):
        account.note(Kind.carried, "chat_template", "chat_template_jinja says which")
    if "\n" not in text and "{" not in text and (account.folder / text).is_file():
        account.carry("chat_template_jinja", "model.chat_template", text)
    else:
        account.left("chat_template_jinja", "text of a template; model.chat_template takes a file")
        account.need("chat_template_jinja: write the template into a file and set model.chat_template=FILE")


def _special_tokens() -> Rule:
    def apply(account: Account) -> None:
        given = account.get("special_tokens")
        if not isinstance(given, dict):
            if account.has("special_tokens"):
                account.left("special_tokens", f"given {given}; the tokenizer's own are taken")
            return
        named = [str(key) for key, value in given.items() if value and key not in ("pad_token", _ADDED)]
        if given.get(_ADDED):
            add_special_tokens(account, "special_tokens", given[_ADDED], _ADDED)
        if named:
            text = f"{', '.join(named)}; the tokenizer's and the chat template's own are taken here"
            account.differs("special_tokens", text)
        if not named and not given.get(_ADDED):
            account.unneeded("special_tokens", "a token to pad with; packs are not padded")

    return Rule(("special_tokens",), NONE, "the tokenizer's own; nothing is padded", apply)


def _train_on_inputs() -> Rule:
    def apply(account: Account) -> None:
        if is_on(account.get("train_on_inputs")):
            account.differs("train_on_inputs", "given true; only what an assistant says is trained here")
        elif account.has("train_on_inputs"):
            account.carry("train_on_inputs", "data.train_on", "all", "all that an assistant says")

    return Rule(("train_on_inputs",), "data.train_on=all", "assistants alone are trained", apply)


def _wandb() -> Rule:
    keys = ("use_wandb", "wandb_project", "wandb_entity", "wandb_mode")

    def apply(account: Account) -> None:
        used = is_on(account.get("use_wandb")) or account.has("wandb_project")
        if not used or str(account.get("wandb_mode")) == "disabled":
            account.put("tracking.wandb", "disabled", "no wandb_project")
        for key, ours in (("wandb_project", "tracking.project"), ("wandb_entity", "tracking.entity")):
            if account.has(key):
                account.carry(key, ours, str(account.get(key)))
        if account.has("wandb_mode"):
            mode = str(account.get("wandb_mode"))
            if mode in ("online", "offline", "disabled"):
                account.carry("wandb_mode", "tracking.wandb", mode)
            else:
                account.left("wandb_mode", f"given {mode}; tracking.wandb is online, offline or disabled")
        if account.has("use_wandb"):
            account.note(Kind.carried, "use_wandb", "W&B as before" if used else "tracking.wandb=disabled")

    return Rule(keys, "tracking.*", "the same", apply)


def _preferences() -> Rule:
    """Rows of preferences, trained as conversations, would be another training than the one that was asked for."""

    def apply(account: Account) -> None:
        if account.has("rl"):
            given = account.get("rl")
            account.left("rl", f"given {given}; supervised fine-tuning is what there is, its export goes on in TRL")
            account.need(f"rl: given {given}; required conversations with answers to train on, and no rl")

    return Rule(("rl",), NONE, "training from preferences goes on in TRL, from the export of a run", apply)


def _deduplication() -> Rule:
    def apply(account: Account) -> None:
        if account.has("dataset_exact_deduplication"):
            on = is_on(account.get("dataset_exact_deduplication"))
            account.carry("dataset_exact_deduplication", "data.deduplicate", on)

    return Rule(("dataset_exact_deduplication",), "data.deduplicate", "the same; on where nothing is said", apply)


def _tokenizer_folder(key: str, value: object) -> str:
    return str(Path(str(value)))


_MODEL = (
    same("base_model", "model.path", _text),
    same("revision_of_model", "model.revision", _text),
    same("model_revision", "model.revision", _text),
    same("tokenizer_config", "model.tokenizer", _tokenizer_folder),
    _chat_template(),
    same("chat_template_kwargs", "model.template_args", mapping),
    _special_tokens(),
    new_tokens("tokens"),
)
_ADAPTER = of_adapters(
    (
        bits(
            method_key="load_in_4bit",
            four=lambda account: account.get("adapter") == "qlora" or is_on(account.get("load_in_4bit")),
            eight=lambda account: is_on(account.get("load_in_8bit")),
            keys=("load_in_4bit", "load_in_8bit"),
        ),
        rank("lora_r", default=8),
        alpha("lora_alpha", default=16.0),
        same("lora_dropout", "tune.dropout", number),
        target("lora_target_modules", default="all-linear", all_key="lora_target_linear"),
        same("peft_use_dora", "tune.dora", lambda key, value: is_on(value)),
        same("peft_use_rslora", "tune.rslora", lambda key, value: is_on(value)),
        further_weights("lora_modules_to_save"),
    ),
    _has_adapter,
)
_STEP = (
    *length(
        "sequence_len",
        overlong(("excess_length_strategy", "sequence_len_overflow_handling"), default="drop"),
        default=512,
    ),
    step_size("micro_batch_size", ("sample_packing",), default=1, further=("eval_batch_size",), total="batch_size"),
    duration("num_epochs", default=1.0),
    *learning(
        optimizer="optimizer",
        schedule="lr_scheduler",
        lr=None,
        default_schedule="cosine",
        default_warmup=0.03,
        least=("cosine_min_lr_ratio",),
    ),
    seed(),
    precision(("bf16", "bfloat16"), ("fp16", "float16"), default="bf16", further=("float32",)),
    deepspeed(),
    fsdp("fsdp_version", "fsdp_final_state_dict_type", "dp_shard_size", "dp_replicate_size"),
    recomputation(
        "gradient_checkpointing", default=False, further=("gradient_checkpointing_kwargs", "selective_checkpointing")
    ),
    compilation("torch_compile_backend", "torch_compile_mode", "torch_compile_options"),
)
_OUTPUT = (
    output_dir(),
    saving(("saves_per_epoch",)),
    evaluating(("eval_strategy", "evaluation_strategy"), ("evals_per_epoch",)),
    _wandb(),
    run_name("wandb_name"),
)
PEER = Peer(
    "axolotl",
    "Axolotl",
    (
        *_MODEL,
        datasets(),
        test_datasets(),
        validation_share("val_set_size"),
        _train_on_inputs(),
        _preferences(),
        _deduplication(),
        _adapter(),
        *_ADAPTER,
        *_STEP,
        *_OUTPUT,
        *OTHERS,
    ),
    always=(
        (
            "(loss)",
            "a mean over all trained tokens of a step here; for Llama and Qwen a mean of the means of micro-batches "
            "there, where a token of a short answer counts more",
        ),
        HELD_OUT,
        ("(keys)", "a key that is misspelled is dropped silently there, and an error here"),
    ),
)
