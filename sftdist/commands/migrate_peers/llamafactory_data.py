"""LLaMA-Factory's `dataset`: names that its dataset_info.json explains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftdist.commands.migrate_peers.account import Account, Kind, number, words
from sftdist.commands.migrate_peers.rule import Rule
from sftdist.commands.migrate_peers.source import NAMES_OF, ROW_FUNCTION, add, our_path
from sftdist.core.errors import ConfigError

INFO = "dataset_info.json"
# The columns that are read here under their own names; None: a set has no such column unless it says so.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
OPTIONAL = {"history": "history", "system": "system", "tools": "tools"}
TURNS = {"messages": ("messages", "conversations", "conversation")}
TAGS = {
    "user_tag": {"human", "user"},
    "assistant_tag": {"gpt", "assistant", "model"},
    "observation_tag": {"observation", "tool", "function_response"},
    "function_tag": {"function_call"},
    "system_tag": {"system"},
}


def dataset() -> Rule:
    """The train rows and their shares."""
    keys = ("dataset", "dataset_dir", "interleave_probs", "mix_strategy")

    def apply(account: Account) -> None:
        names = words("dataset", account.get("dataset", []))
        info = _info(account)
        added = [_one(account, "dataset", name, info) for name in names]
        if names:
            account.note(Kind.carried, "dataset", f"data.sources: {', '.join(filter(None, added))}")
        if account.has("dataset_dir"):
            account.note(Kind.carried, "dataset_dir", "where the files of the sources are")
        _shares(account, added)

    return Rule(keys, "data.sources, lam", f"each name is a source, as {INFO} says", apply)


def eval_dataset() -> Rule:
    """The validation rows."""

    def apply(account: Account) -> None:
        if not account.has("eval_dataset"):
            return
        info, paths = _info(account), []
        for name in words("eval_dataset", account.get("eval_dataset")):
            path = _path(account, "eval_dataset", name, info.get(name, {}))
            paths += [path] if path and not path.startswith("hub:") else []
        if paths:
            account.carry("eval_dataset", "data.val", paths[0] if len(paths) == 1 else paths)
        else:
            account.left("eval_dataset", "data.val takes files, and none of these is one")

    return Rule(("eval_dataset",), "data.val", "the same", apply)


def _folder(account: Account) -> Path:
    return Path(str(account.get("dataset_dir", "data")))


def _info(account: Account) -> dict[str, Any]:
    file = account.folder / _folder(account) / INFO
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def _one(account: Account, key: str, name: str, info: dict[str, Any]) -> str | None:
    """Add a source; its name."""
    entry = info.get(name, {})
    path = _path(account, key, name, entry)
    if path is None:
        return None
    hub = {
        ours: str(entry[theirs])
        for theirs, ours in (("subset", "hub_config"), ("split", "hub_split"))
        if entry.get(theirs)
    }
    shape, missing = _shape(entry)
    values = {"path": path, **({"shape": shape} if shape else {}), **(hub if path.startswith("hub:") else {})}
    added = add(account, values, "dataset")
    if missing:
        account.left(key, f"{name}: {missing}")
        account.need(f"source {added}: {missing}; {ROW_FUNCTION.format(name=added)}")
    if entry.get("ranking"):
        account.left(key, f"{name}: rows with a chosen and a rejected answer; conversations are trained here")
        account.need(f"source {added}: give conversations, such as the chosen answers")
    if entry.get("num_samples"):
        account.left(key, f"{name}: num_samples {entry['num_samples']}; all rows are taken")
    return added


def _path(account: Account, key: str, name: str, entry: dict[str, Any]) -> str | None:
    if entry.get("hf_hub_url"):
        return f"hub:{entry['hf_hub_url']}"
    if entry.get("file_name"):
        return our_path(account, key, str(_folder(account) / str(entry["file_name"])))
    file = str(_folder(account) / f"{name}.json")
    account.differs(key, f"{name}: {_folder(account) / INFO} has no file for it; {file} is taken")
    account.need(f"source {name}: look at its path; {_folder(account) / INFO} was not there to say which file it is")
    return file


def _shape(entry: dict[str, Any]) -> tuple[str | None, str | None]:
    """Our word for the shape, and what a row function would have to do."""
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    kind = str(entry.get("formatting", "alpaca"))
    if not entry:
        return None, None
    if kind == "alpaca":
        given = {column: columns.get(column) for column in (*ALPACA, *OPTIONAL) if columns.get(column)}
        wanted = {**ALPACA, **OPTIONAL}
        other = [f"{column} is {name}" for column, name in given.items() if wanted[column] != name]
        return ("alpaca", None) if not other else (None, f"its columns have other names ({', '.join(other)})")
    field = str(columns.get("messages", "conversations"))
    pair = (
        ("role", "content")
        if kind == "openai"
        else (str(tags.get("role_tag", "from")), str(tags.get("content_tag", "value")))
    )
    strange = [str(tags[tag]) for tag, known in TAGS.items() if tags.get(tag) and tags[tag] not in known]
    if pair not in NAMES_OF or field not in TURNS["messages"] or strange:
        return None, f"its turns are in {field}, as {' and '.join(pair)}" + (
            f", of {', '.join(strange)}" if strange else ""
        )
    return NAMES_OF[pair], None


def _shares(account: Account, added: list[str | None]) -> None:
    if account.has("interleave_probs"):
        shares = [
            number("interleave_probs", share)
            for share in words("interleave_probs", str(account.get("interleave_probs")))
        ]
        sources = account.values.get("data.sources", {})
        if len(shares) == len(added) and all(added):
            for name, share in zip(added, shares, strict=True):
                sources[str(name)]["lam"] = share
            account.note(Kind.carried, "interleave_probs", f"lam {shares}")
            account.differs("interleave_probs", "shares of rows there, of trained tokens here")
        else:
            account.left(
                "interleave_probs", f"given {len(shares)} shares for {len(added)} sets; data.mix takes one for each"
            )
    if account.has("mix_strategy"):
        if str(account.get("mix_strategy")) == "concat":
            account.unneeded("mix_strategy", "sources are drawn by their natural shares")
        else:
            account.differs(
                "mix_strategy", "a run ends with train.epochs; data.max_passes bounds how often a row is drawn"
            )
