"""Axolotl's `datasets`: a list of mappings, each a source here."""

from __future__ import annotations

from typing import Any

from sftdist.commands.migrate_peers.account import Account, Kind, is_on, mapping, words, wrong
from sftdist.commands.migrate_peers.rule import NONE, Rule, carry_over, differ, leave, skip
from sftdist.commands.migrate_peers.source import LISTS, NAMES_OF, ROW_FUNCTION, add, hub_keys, our_path

HUB = {"split": "hub_split", "name": "hub_config", "revision": "hub_revision"}
ASSISTANT = {"assistant", "gpt", "model"}
_TURNS = ("field_messages", "message_property_mappings", "message_field_role", "message_field_content")
_COLUMNS = ("field", "field_human", "field_model", "field_system", "field_instruction", "field_input", "field_output")
# The default of the roles: these names are what they are here, too.
_ROLES = {
    "user": {"human", "user"},
    "assistant": {"gpt", "assistant", "model"},
    "system": {"system"},
    "tool": {"tool"},
}


def datasets() -> Rule:
    """The train rows."""

    def apply(account: Account) -> None:
        entries = _entries(account, "datasets")
        for number, entry in enumerate(entries):
            inner = account.below(entry)
            inner.values = account.values  # sources are collected in one place
            inner.origins = account.origins
            _one(inner)
            account.take_in(inner, f"datasets[{number}]")
        if account.has("datasets"):
            named = ", ".join(account.values.get("data.sources", {}))
            account.note(Kind.carried, "datasets", f"data.sources: {named}" if named else "see each of them")
        if len(entries) > 1:
            account.differs("datasets", "rows are drawn by natural shares, as there; data.mix changes the shares")

    return Rule(("datasets",), "data.sources", "each entry is a source", apply)


def test_datasets() -> Rule:
    """The validation rows."""

    def apply(account: Account) -> None:
        paths = []
        for number, entry in enumerate(_entries(account, "test_datasets")):
            inner = account.below(entry)
            path = _path(inner)
            paths += [path] if path else []
            for key in inner.given:
                if key not in inner.answered():
                    inner.note(*_of_a_validation_set(key))
            account.take_in(inner, f"test_datasets[{number}]")
        if paths:
            account.carry("test_datasets", "data.val", paths[0] if len(paths) == 1 else paths)
        elif account.has("test_datasets"):
            account.left("test_datasets", "no file of them can be read here")

    return Rule(("test_datasets",), "data.val", "their files", apply)


def _of_a_validation_set(key: str) -> tuple[Kind, str, str]:
    if key in ("path", "data_files", "type", "ds_type"):
        return Kind.carried, key, "data.val"
    return Kind.left, key, "data.val takes files, of any shape that is recognised"


def _entries(account: Account, key: str) -> list[dict[str, Any]]:
    found = account.get(key, [])
    if not isinstance(found, list):
        raise wrong(key, found, "a list of datasets, each with a path")
    return [mapping(f"{key}[{number}]", entry) for number, entry in enumerate(found)]


def _one(account: Account) -> None:
    """An entry with its own account."""
    path = _path(account)
    shape, function = _shape(account)
    hub = hub_keys(account, path if isinstance(path, str) else "", HUB)
    if path is not None:
        values = {"path": path, **({"shape": shape} if shape else {}), **hub}
        name = add(account, values, "datasets")
        if function:
            account.need(f"source {name}: {function}; " + ROW_FUNCTION.format(name=name))
    rules = (
        Rule(("path", "data_files"), "path", "the file, or hub:NAME", _say_path(path)),
        *_RULES,
    )
    carry_over(rules, account)


def _path(account: Account) -> str | list[str] | None:
    """`path: json` with data_files means these files."""
    if not account.has("path"):
        raise wrong("path", None, "a file, a folder or a set of the Hub in each of the datasets")
    files = account.get("data_files")
    if files is not None and str(account.get("path")) in ("json", "parquet", "csv", "text", "arrow"):
        listed = [our_path(account, "data_files", name) for name in words("data_files", files)]
        kept = [name for name in listed if name is not None]
        return (kept[0] if len(kept) == 1 else kept) or None
    path = our_path(account, "path", str(account.get("path", "")))
    if files is not None:
        account.left("data_files", f"given {files}; of a folder or a set of the Hub all files are read")
    return path


def _say_path(path: object) -> Any:
    def apply(account: Account) -> None:
        for key in ("path", "data_files"):
            if account.has(key) and key not in account.answered():
                account.note(Kind.carried, key, f"path={path}")

    return apply


def _shape(account: Account) -> tuple[str | None, str | None]:
    """Our word for the shape of a row (None: it is recognised), and what a row function would have to do."""
    kind = account.get("type", "")
    if isinstance(kind, dict):
        account.left("type", "a prompt of one's own; here a conversation is laid out by the model's chat template")
        return None, "its rows have columns of their own"
    family = str(kind).partition(":")[0].partition(".")[0]
    if family == "chat_template":
        return _turns(account)
    if family == "sharegpt":
        account.note(Kind.carried, "type", "shape=sharegpt")
        return "sharegpt", None
    if family in ("alpaca", "alpaca_chat", "alpaca_w_system", "alpaca_instruct"):
        account.note(Kind.carried, "type", "shape=alpaca")
        account.differs("type", "Alpaca's own wording is the prompt there; here the model's chat template lays it out")
        return "alpaca", None
    if family in ("completion", "pretrain", "input_output", "metharme", "user_defined"):
        account.left("type", f"given {kind}; conversations are trained here, and no running text or ready tokens")
        return None, f"rows of {family} are no conversations"
    if kind:
        account.differs(
            "type", f"given {kind}; the shape of the rows is recognised, their prompt is the chat template's"
        )
    return None, None


def _turns(account: Account) -> tuple[str | None, str | None]:
    account.note(Kind.carried, "type", "the model's chat template")
    names = mapping("message_property_mappings", account.get("message_property_mappings", {}))
    role = str(account.get("message_field_role", names.get("role", "role")))
    content = str(account.get("message_field_content", names.get("content", "content")))
    field = str(account.get("field_messages", "messages"))
    shape = NAMES_OF.get((role, content))
    fits = shape is not None and field in LISTS
    for key in filter(account.has, _TURNS):
        if fits:
            account.note(Kind.carried, key, f"shape={shape}")
        else:
            account.left(
                key, f"given {account.get(key)}; known are lists {', '.join(LISTS)} of role/content or from/value"
            )
    if fits and not any(map(account.has, _TURNS)):
        return None, None  # rows are recognised
    return (shape, None) if fits else (None, f"its turns are in {field}, as {role} and {content}")


def _roles(account: Account) -> None:
    if not account.has("roles"):
        return
    given = {role: set(words(f"roles.{role}", names)) for role, names in mapping("roles", account.get("roles")).items()}
    if all(names <= _ROLES.get(role, set()) for role, names in given.items()):
        account.note(Kind.carried, "roles", "these names are known")
    else:
        account.left("roles", f"given {account.get('roles')}; names of roles are fixed here")
        account.need("roles: a row function has to rename them (data.sources.NAME.row_function)")


def _roles_to_train(account: Account) -> None:
    if not account.has("roles_to_train"):
        return
    named = set(words("roles_to_train", account.get("roles_to_train")))
    if named and named <= ASSISTANT:
        account.note(Kind.carried, "roles_to_train", "assistants are what is trained")
    else:
        account.differs("roles_to_train", f"given {sorted(named)}; only what an assistant says is trained here")


def _ends(account: Account) -> None:
    for key in filter(account.has, ("train_on_eos", "train_on_eot")):
        if str(account.get(key)) == "turn":
            account.note(Kind.carried, key, "the end of each trained turn is trained")
        else:
            account.differs(
                key, f"given {account.get(key)}; here the end of each trained turn is trained, and no other"
            )


def _flags(account: Account) -> None:
    if account.has("message_field_training"):
        if account.get("message_field_training") == "train":
            account.note(Kind.carried, "message_field_training", "a turn's key train")
        else:
            account.left(
                "message_field_training", f"given {account.get('message_field_training')}; ours is called train"
            )
            account.need("message_field_training: rename this key of each turn to train")


def _thinking(account: Account) -> None:
    for key in filter(account.has, ("field_thinking", "template_thinking_key")):
        if account.get(key) == "reasoning_content":
            account.note(Kind.carried, key, "a turn's key reasoning_content")
        else:
            account.left(key, f"given {account.get(key)}; reasoning stands in a turn's reasoning_content here")


_RULES = (
    Rule(("type", *_TURNS), "shape", "messages, sharegpt or alpaca", lambda account: None),
    Rule(tuple(HUB), "hub_split, hub_config, hub_revision", "of a set of the Hub", lambda account: None),
    Rule(("roles",), NONE, "the usual names are known", _roles),
    Rule(("roles_to_train",), NONE, "assistants", _roles_to_train),
    Rule(("train_on_eos", "train_on_eot"), NONE, "turn", _ends),
    Rule(("message_field_training",), NONE, "train", _flags),
    Rule(("field_thinking", "template_thinking_key"), NONE, "reasoning_content", _thinking),
    skip("the shape of the rows is known", "conversation", "input_format"),
    skip("files are read by their ending", "ds_type"),
    skip("all rows are read, by as many processes as data.workers", "preprocess_shards"),
    skip("nothing that a set of the Hub brings along is run", "trust_remote_code"),
    differ("one template for all sources: model.chat_template", "chat_template", "chat_template_jinja"),
    leave("a weight per turn: its key weight", "message_field_training_detail"),
    leave("only some of the rows; give a file with these", "shards", "shards_idx"),
    leave("a system turn is part of the conversation", "drop_system_message"),
    leave("columns of one's own need a row function", *_COLUMNS, "input_transform", "field_tools", "split_thinking"),
    leave("distillation and text of its own kind", "logprobs_field", "temperature", "text_column", "skip"),
)


def validation_share(key: str) -> Rule:
    """A share of the rows, or a number of them."""

    def apply(account: Account) -> None:
        if not account.has(key):
            return
        share = account.get(key)
        value = float(share) if isinstance(share, int | float) and not isinstance(share, bool) else None
        if value is None:
            raise wrong(key, share, "a number")
        if 0 <= value < 1:
            account.carry(key, "data.val_fraction", value)
            if not is_on(value):
                account.put("eval.every_steps", 0, f"{key}: no validation rows")
        else:
            account.differs(key, f"given {value:g} rows; data.val_fraction is a share, 0.02 where nothing is said")

    return Rule((key,), "data.val_fraction", "a share; a number of rows becomes 0.02", apply)
