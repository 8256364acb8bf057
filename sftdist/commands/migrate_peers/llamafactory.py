"""LLaMA-Factory's YAML for `llamafactory-cli train FILE` (version 0.9.5)."""

from __future__ import annotations

from sftdist.commands.migrate_peers.account import Account, Kind, is_on, number, whole
from sftdist.commands.migrate_peers.adapting import (
    alpha,
    bits,
    further_weights,
    nested_quantisation,
    of_adapters,
    rank,
    target,
)
from sftdist.commands.migrate_peers.axolotl_data import validation_share
from sftdist.commands.migrate_peers.engine import compilation, deepspeed, fsdp, precision, recomputation
from sftdist.commands.migrate_peers.llamafactory_data import dataset, eval_dataset
from sftdist.commands.migrate_peers.llamafactory_others import OTHERS
from sftdist.commands.migrate_peers.new_tokens import new_special_tokens, new_tokens
from sftdist.commands.migrate_peers.optimizing import learning
from sftdist.commands.migrate_peers.reporting import output_dir, report_to, run_name
from sftdist.commands.migrate_peers.rule import HELD_OUT, NONE, Peer, Rule, same
from sftdist.commands.migrate_peers.stepping import duration, evaluating, length, overlong, saving, seed, step_size
from sftdist.commands.migrate_peers.trainer_others import TRAINER_OTHERS


def _text(key: str, value: object) -> str:
    return str(value)


def _on(key: str, value: object) -> bool:
    return is_on(value)


def _has_adapter(account: Account) -> bool:
    return str(account.get("finetuning_type", "lora")) == "lora"


def _stage() -> Rule:
    def apply(account: Account) -> None:
        stage = str(account.get("stage", "sft"))
        if stage == "sft":
            if account.has("stage"):
                account.note(Kind.carried, "stage", "supervised fine-tuning")
            return
        account.left("stage", f"given {stage}; supervised fine-tuning is what there is")
        account.need(f"stage: given {stage}; required sft: conversations with answers to train on")

    return Rule(("stage",), NONE, "sft", apply)


def _method() -> Rule:
    def apply(account: Account) -> None:
        method = str(account.get("finetuning_type", "lora"))
        if method in ("lora", "full"):
            account.put(
                "tune.method", method, "finetuning_type" + ("" if account.has("finetuning_type") else ", not given")
            )
            if account.has("finetuning_type"):
                account.note(Kind.carried, "finetuning_type", f"tune.method={method}")
        else:
            account.put("tune.method", "lora", f"instead of {method}")
            account.left("finetuning_type", f"given {method}; full, LoRA and QLoRA are what there is: lora is taken")

    return Rule(("finetuning_type",), "tune.method", "full, lora", apply)


def _template() -> Rule:
    def apply(account: Account) -> None:
        if account.has("template"):
            name = account.get("template")
            account.differs(
                "template",
                f"given {name}, a template of its own code; the tokenizer's is taken here, which may write another "
                "system turn: compare with `sftdist inspect`, or give model.chat_template=FILE",
            )

    return Rule(("template",), "model.chat_template", "the tokenizer's own template", apply)


def _thinking() -> Rule:
    def apply(account: Account) -> None:
        if account.has("enable_thinking"):
            if is_on(account.get("enable_thinking")):
                account.unneeded("enable_thinking", "the template's default")
            else:
                account.carry("enable_thinking", "model.template_args", {"enable_thinking": False})
        if account.has("preserve_thinking"):
            reasoning = "keep" if is_on(account.get("preserve_thinking")) else "last"
            account.carry("preserve_thinking", "data.reasoning", reasoning)

    about = "false becomes a variable of the template; reasoning of earlier turns"
    return Rule(("enable_thinking", "preserve_thinking"), "model.template_args, data.reasoning", about, apply)


def _masking() -> Rule:
    def apply(account: Account) -> None:
        if account.has("train_on_prompt"):
            if is_on(account.get("train_on_prompt")):
                account.differs("train_on_prompt", "given true; only what an assistant says is trained here")
            else:
                account.carry("train_on_prompt", "data.train_on", "all", "all that an assistant says")
        if account.has("mask_history"):
            last = is_on(account.get("mask_history"))
            account.carry("mask_history", "data.train_on", "last" if last else "all")

    return Rule(("train_on_prompt", "mask_history"), "data.train_on", "all or last; prompts are not trained", apply)


def _quantised(account: Account) -> int:
    return whole("quantization_bit", account.get("quantization_bit", 0))


def _flash() -> Rule:
    def apply(account: Account) -> None:
        if account.has("flash_attn"):
            account.unneeded("flash_attn", "the fastest attention that keeps packed conversations apart is chosen")

    return Rule(("flash_attn",), NONE, "model.attention=auto chooses", apply)


_MODEL = (
    same("model_name_or_path", "model.path", _text),
    same("model_revision", "model.revision", _text),
    _template(),
    _thinking(),
    new_tokens("add_tokens"),
    new_special_tokens("add_special_tokens"),
)
_DATA = (_stage(), dataset(), eval_dataset(), validation_share("val_size"), _masking())
_ADAPTER = of_adapters(
    (
        bits(
            method_key="quantization_bit",
            four=lambda account: _quantised(account) == 4,
            eight=lambda account: _quantised(account) not in (0, 4),
            keys=("quantization_bit",),
        ),
        nested_quantisation("double_quantization", default=True),
        rank("lora_rank", default=8),
        alpha("lora_alpha"),
        same("lora_dropout", "tune.dropout", number),
        target("lora_target", default="all-linear"),
        same("use_rslora", "tune.rslora", _on),
        same("use_dora", "tune.dora", _on),
        further_weights("additional_target"),
    ),
    _has_adapter,
)
_STEP = (
    *length(
        "cutoff_len",
        overlong(
            (),
            default="truncate",
            say="cut turn by turn there; here at the end, and a row without a trained token goes",
        ),
        default=2048,
    ),
    step_size(
        "per_device_train_batch_size", ("packing", "neat_packing"), default=8, further=("per_device_eval_batch_size",)
    ),
    duration("num_train_epochs", default=3.0),
    *learning(optimizer="optim", schedule="lr_scheduler_type", lr=5e-5, default_schedule="linear", default_warmup=0.0),
    seed(),
    precision(("bf16", "pure_bf16"), ("fp16",), default="fp32"),
    deepspeed(),
    fsdp(),
    recomputation(
        "disable_gradient_checkpointing",
        default=True,
        further=(
            *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_reentrant_gc", "use_unsloth_gc"),
            *("activation_checkpointing", "activation_checkpointing_kwargs"),
        ),
        inverted=True,
    ),
    compilation("torch_compile_backend", "torch_compile_mode"),
)
_OUTPUT = (
    output_dir(),
    saving(),
    evaluating(("eval_strategy", "evaluation_strategy")),
    report_to(default="none", project="project"),
    run_name("run_name"),
)
PEER = Peer(
    "llamafactory",
    "LLaMA-Factory",
    (*_MODEL, *_DATA, _method(), *_ADAPTER, *_STEP, *_OUTPUT, _flash(), *OTHERS, *TRAINER_OTHERS),
    always=(
        ("(packing)", "plain packing lets conversations see one another there, depending on the attention; here never"),
        (
            "(system)",
            "rows in OpenAI's format get 'detailed thinking off' in their system turn there; here nothing is added",
        ),
        HELD_OUT,
    ),
)
