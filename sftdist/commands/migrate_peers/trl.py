"""TRL's YAML for `trl sft --config FILE`: SFTConfig, ModelConfig, ScriptArguments and its datasets, version 1.16."""

from __future__ import annotations

from typing import Any

from sftdist.commands.migrate_peers.account import Account, Kind, is_on, mapping, number, whole, wrong
from sftdist.commands.migrate_peers.adapting import (
    USUAL,
    alpha,
    bits,
    further_weights,
    nested_quantisation,
    of_adapters,
    rank,
    target,
)
from sftdist.commands.migrate_peers.engine import compilation, deepspeed, fsdp, precision, recomputation
from sftdist.commands.migrate_peers.optimizing import learning
from sftdist.commands.migrate_peers.reporting import output_dir, report_to, run_name
from sftdist.commands.migrate_peers.rule import HELD_OUT, NONE, Peer, Rule, carry_over, differ, leave, same, skip
from sftdist.commands.migrate_peers.source import add, hub_keys, our_path
from sftdist.commands.migrate_peers.stepping import duration, evaluating, length, overlong, saving, seed, step_size
from sftdist.commands.migrate_peers.trainer_others import TRAINER_OTHERS

HUB = {"dataset_config": "hub_config", "dataset_train_split": "hub_split"}
MIXED = {"name": "hub_config", "split": "hub_split"}


def _text(key: str, value: object) -> str:
    return str(value)


def _on(key: str, value: object) -> bool:
    return is_on(value)


def _has_adapter(account: Account) -> bool:
    return is_on(account.get("use_peft"))


def _adapter() -> Rule:
    def apply(account: Account) -> None:
        method = "lora" if _has_adapter(account) else "full"
        account.put("tune.method", method, "use_peft" if account.has("use_peft") else "use_peft is not given")
        if account.has("use_peft"):
            account.note(Kind.carried, "use_peft", f"tune.method={method}")

    return Rule(("use_peft",), "tune.method", "lora; without it full", apply)


def _revision() -> Rule:
    def apply(account: Account) -> None:
        revision = str(account.get("model_revision", "main"))
        if revision != "main":
            account.carry("model_revision", "model.revision", revision)
        elif account.has("model_revision"):
            account.unneeded("model_revision", "main is what is taken")

    return Rule(("model_revision",), "model.revision", "the same", apply)


def _dataset() -> Rule:
    def apply(account: Account) -> None:
        if account.has("dataset_name") and not account.has("datasets"):
            path = our_path(account, "dataset_name", str(account.get("dataset_name")))
            hub = hub_keys(account, path or "", HUB)
            if path is not None:
                account.note(
                    Kind.carried, "dataset_name", f"data.sources.{add(account, {'path': path, **hub}, 'dataset_name')}"
                )
        else:
            for key in filter(account.has, ("dataset_name", *HUB)):
                account.unneeded(key, "datasets says which" if account.has("datasets") else "no dataset_name is given")

    return Rule(("dataset_name", *HUB), "data.sources", "a source; a folder, a file or hub:NAME", apply)


def _mixture() -> Rule:
    def apply(account: Account) -> None:
        if not account.has("datasets"):
            return
        found = account.get("datasets")
        if not isinstance(found, list):
            raise wrong("datasets", found, "a list of datasets, each with a path")
        for position, entry in enumerate(found):
            inner = account.below(mapping(f"datasets[{position}]", entry))
            inner.values, inner.origins = account.values, account.origins
            _mixed(inner)
            account.take_in(inner, f"datasets[{position}]")
        account.note(Kind.carried, "datasets", f"data.sources: {', '.join(account.values.get('data.sources', {}))}")

    return Rule(("datasets",), "data.sources", "each entry is a source", apply)


def _mixed(account: Account) -> None:
    path = our_path(account, "path", str(account.get("path", "")))
    files = account.get("data_files")
    if isinstance(files, str) and path in ("hub:json", "hub:parquet"):
        path = our_path(account, "data_files", files)
        account.note(Kind.carried, "data_files", f"path={path}")
    elif files is not None:
        account.left("data_files", f"given {files}; of a folder or a set of the Hub all files are read")
    hub = hub_keys(account, path or "", MIXED)
    if path is not None:
        account.note(Kind.carried, "path", f"data.sources.{add(account, {'path': path, **hub}, 'datasets')}")
    carry_over(_ENTRY, account)


_ENTRY = (
    Rule(("path", "data_files"), "path", "the file, or hub:NAME", lambda account: None),
    Rule(tuple(MIXED), "hub_config, hub_split", "of a set of the Hub", lambda account: None),
    skip("a row's other keys are not read", "columns"),
    leave("a folder inside of a set of the Hub", "data_dir"),
    differ("data.mix gives the shares; there the first rows of each set are taken", "fraction"),
)


def _validation() -> Rule:
    def apply(account: Account) -> None:
        if account.has("dataset_test_split"):
            account.left("dataset_test_split", f"given {account.get('dataset_test_split')}; data.val takes files")
        if account.has("test_split_size"):
            share = account.get("test_split_size")
            if isinstance(share, float) and 0 < share < 1:
                account.carry("test_split_size", "data.val_fraction", share)
                account.differs(
                    "test_split_size", "drawn anew on every rank there, with a seed of its own; here one split for all"
                )
            else:
                account.differs(
                    "test_split_size", f"given {share}; data.val_fraction is a share, 0.02 where nothing is said"
                )

    return Rule(("dataset_test_split", "test_split_size"), "data.val_fraction", "a share", apply)


def _masking() -> Rule:
    def apply(account: Account) -> None:
        only = is_on(account.get("assistant_only_loss"))
        if account.has("assistant_only_loss"):
            if only:
                account.carry("assistant_only_loss", "data.train_on", "all", "all that an assistant says")
            else:
                account.differs("assistant_only_loss", "given false; only what an assistant says is trained here")
        else:
            account.differs(
                "(assistant_only_loss)", "false where it is not given: prompts are trained, too; here they are not"
            )
        if account.has("completion_only_loss"):
            if is_on(account.get("completion_only_loss")):
                account.carry(
                    "completion_only_loss", "data.train_on", "all", "the completion, which is the assistant's"
                )
            else:
                account.differs("completion_only_loss", "given false; only what an assistant says is trained here")

    keys = ("assistant_only_loss", "completion_only_loss")
    return Rule(keys, "data.train_on=all", "assistants alone are trained, with any chat template", apply)


def _text_field() -> Rule:
    def apply(account: Account) -> None:
        if account.has("dataset_text_field"):
            account.left(
                "dataset_text_field",
                f"given {account.get('dataset_text_field')}; a row is a conversation here (messages), rendered once",
            )

    about = "rendered text is not read: give the conversations that it was made from"
    return Rule(("dataset_text_field",), NONE, about, apply)


def _attention() -> Rule:
    reason = "the fastest attention that keeps packed conversations apart is chosen: model.attention=auto"
    return skip(reason, "attn_implementation", "padding_free")


def _packing_strategy() -> Rule:
    def apply(account: Account) -> None:
        if account.has("packing_strategy"):
            given = str(account.get("packing_strategy"))
            if given == "bfd":
                account.unneeded("packing_strategy", "packs of whole conversations, here, too")
            else:
                account.differs("packing_strategy", f"given {given}, which cuts conversations; here they stay whole")

    return Rule(("packing_strategy",), NONE, "conversations stay whole", apply)


def _loss() -> Rule:
    def apply(account: Account) -> None:
        if account.has("loss_type"):
            if str(account.get("loss_type")) in ("nll", "chunked_nll"):
                account.unneeded(
                    "loss_type", "the mean over the trained tokens, and logits in chunks, is what there is"
                )
            else:
                account.left(
                    "loss_type", f"given {account.get('loss_type')}; the mean over the trained tokens is taken"
                )

    return Rule(("loss_type",), NONE, "nll", apply)


_MODEL = (
    same("model_name_or_path", "model.path", _text),
    _revision(),
    same("tokenizer_name_or_path", "model.tokenizer", _text),
    same("chat_template_path", "model.chat_template", _text),
)
_DATA = (_dataset(), _mixture(), _validation(), _masking(), _text_field())
_ADAPTER = of_adapters(
    (
        bits(
            method_key="load_in_4bit",
            four=lambda account: is_on(account.get("load_in_4bit")),
            eight=lambda account: is_on(account.get("load_in_8bit")),
            keys=("load_in_4bit", "load_in_8bit"),
        ),
        nested_quantisation("use_bnb_nested_quant", default=False),
        rank("lora_r", default=16),
        alpha("lora_alpha", default=32.0),
        same("lora_dropout", "tune.dropout", number, default=0.05),
        target("lora_target_modules", default=USUAL),
        same("use_rslora", "tune.rslora", _on),
        same("use_dora", "tune.dora", _on),
        further_weights("lora_modules_to_save"),
    ),
    _has_adapter,
)
_STEP = (
    *length("max_length", overlong(("truncation_mode",), default="truncate"), default=1024),
    step_size("per_device_train_batch_size", ("packing",), default=8, further=("per_device_eval_batch_size",)),
    duration("num_train_epochs", default=3.0),
    *learning(optimizer="optim", schedule="lr_scheduler_type", lr=2e-5, default_schedule="linear", default_warmup=0.0),
    seed(),
    precision(("bf16",), ("fp16",), default="bf16", further=("dtype", "torch_dtype")),
    deepspeed(),
    fsdp(),
    recomputation(
        "activation_checkpointing",
        default=True,
        earlier="gradient_checkpointing",
        further=("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
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
_OTHERS = (
    *TRAINER_OTHERS,
    _attention(),
    _packing_strategy(),
    _loss(),
    skip("rows are tokenised by data.workers processes", "dataset_num_proc", "dataset_kwargs", "dataset_batch_size"),
    skip("nothing is padded", "pad_token", "pad_to_multiple_of", "eval_packing"),
    skip("rows are drawn by a plan that depends on the seed alone", "shuffle_dataset"),
    skip("data need not fit into memory", "dataset_streaming", "streaming"),
    skip("a way around a fault of DDP", "ignore_bias_buffers"),
    skip("memory is planned: `sftdist plan`", "activation_offloading"),
    skip(
        "the kind of four bits is nf4, in bf16",
        "bnb_4bit_quant_type",
        "bnb_4bit_quant_storage",
        "bnb_4bit_compute_dtype",
    ),
    skip("of adapters there is one task", "lora_task_type"),
    leave("the model's own config is taken as it is", "model_init_kwargs", "router_aux_loss_coef"),
    leave("the tokenizer's own end of a turn is taken, found in the chat template", "eos_token"),
    leave("tune.target takes names of modules", "lora_target_parameters"),
)


def _older_names() -> Rule:
    """`max_seq_length` is what versions before 0.20 called max_length."""

    def apply(account: Account) -> None:
        if account.has("max_seq_length"):
            if account.has("max_length"):
                account.unneeded("max_seq_length", "max_length decides")
            else:
                account.carry(
                    "max_seq_length",
                    "data.max_len",
                    whole("max_seq_length", account.get("max_seq_length")),
                    "now max_length",
                )

    return Rule(("max_seq_length",), "data.max_len", "the earlier name of max_length", apply)


def _entries() -> tuple[Rule, ...]:
    return (*_MODEL, *_DATA, _adapter(), *_ADAPTER, *_STEP, _older_names(), *_OUTPUT, *_OTHERS)


ALWAYS: tuple[tuple[str, Any], ...] = (
    (
        "(text)",
        "rows of rendered text get the tokenizer's BOS once more there, though the template wrote one; here rows are "
        "conversations, and start with one",
    ),
    HELD_OUT,
    ("(eval)", "eval/loss is a mean over all tokens here, and one over batches there"),
)
PEER = Peer("trl", "TRL", _entries(), ALWAYS)
