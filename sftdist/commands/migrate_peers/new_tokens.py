"""Tokens that a job adds to its tokenizer."""

from __future__ import annotations

from sftdist.commands.migrate_peers.account import Account, Kind, words
from sftdist.commands.migrate_peers.rule import Rule

OURS = "model.add_tokens"
_SPECIAL = "special there; here an answer that is decoded without special tokens keeps them"


def new_tokens(key: str) -> Rule:
    def apply(account: Account) -> None:
        if account.has(key):
            add_tokens(account, key, account.get(key))

    return Rule((key,), OURS, "each becomes one id", apply)


def new_special_tokens(key: str) -> Rule:
    def apply(account: Account) -> None:
        if account.has(key):
            add_special_tokens(account, key, account.get(key))

    return Rule((key,), OURS, "the same; kept in answers that are decoded without special tokens", apply)


def add_tokens(account: Account, key: str, value: object) -> None:
    account.note(Kind.carried, key, f"{OURS} has {', '.join(_put(account, key, value))}")


def add_special_tokens(account: Account, key: str, value: object, name: str = "") -> None:
    """`name`: of the list inside of the key's mapping."""
    added = _put(account, f"{key}.{name}".rstrip("."), value)
    account.differs(key, f"{f'{name}: ' if name else ''}{OURS} has {', '.join(added)}, {_SPECIAL}")


def _put(account: Account, key: str, value: object) -> list[str]:
    """A token may come under several keys; each is added once."""
    found = words(key, value)
    account.put(OURS, list(dict.fromkeys([*account.values.get(OURS, []), *found])), key)
    return found
