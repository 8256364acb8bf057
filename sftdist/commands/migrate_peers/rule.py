"""A rule answers for some keys of a peer; all rules of a peer together answer for every key that it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sftdist.commands.migrate_peers.account import Account, Kind, is_on

NONE = "-"  # where there is no key of ours
# Every peer trains on all rows unless it is told otherwise.
HELD_OUT = (
    "(held out)",
    "2 % of the rows are kept for sftdist publish (data.holdout_fraction, 0 for none), and 2 % for eval/loss where "
    "nothing is said (data.val_fraction)",
)


@dataclass(frozen=True)
class Rule:
    """`keys` of the peer, the `ours` that they become, a line `about` it, and what carries them over.

    `apply` is called once, also where the file gives none of the keys: what the peer takes then may differ from ours.
    """

    keys: tuple[str, ...]
    ours: str
    about: str
    apply: Callable[[Account], None]


@dataclass(frozen=True)
class Peer:
    """A trainer whose files are read. `always`: (word, text) of what differs in any file, and no key says."""

    name: str
    title: str
    rules: tuple[Rule, ...]
    always: tuple[tuple[str, str], ...] = ()

    @property
    def known(self) -> list[str]:
        """Every key that a rule answers for."""
        return [key for rule in self.rules for key in rule.keys]


def carry_over(rules: tuple[Rule, ...], account: Account) -> None:
    """Apply the rules; a key that none of them answers for is noted as unknown."""
    for rule in rules:
        rule.apply(account)
    known = [key for rule in rules for key in rule.keys]
    for key in account.empty:
        if key in known:
            account.unneeded(key, "no value is given")
    answered = account.answered()
    for key in [*account.given, *account.empty]:
        if key not in known:
            close = get_close_matches(key, known, n=1, cutoff=0.8)
            account.note(Kind.unknown, key, f"did you mean {close[0]}?" if close else "no key that is known here")
        else:
            assert key in answered, f"the rule of {key} says nothing about it"


# --- rules of one kind ---------------------------------------------------------------------------------------------


def same(key: str, ours: str, convert: Callable[[str, Any], Any], *, default: Any = None, about: str = "") -> Rule:
    """A key that means the same; `default`: what the peer takes without it, where that is not our default."""

    def apply(account: Account) -> None:
        if account.has(key):
            account.carry(key, ours, convert(key, account.get(key)))
        elif default is not None:
            account.default(key, ours, default)

    return Rule((key,), ours, about or "the same", apply)


def leave(reason: str, *keys: str) -> Rule:
    """Keys with nothing like them here; what is switched off in the file is no loss."""

    def apply(account: Account) -> None:
        for key in filter(account.has, keys):
            if is_on(account.get(key)):
                account.left(key, reason)
            else:
                account.unneeded(key, "switched off there, and not done here")

    return Rule(keys, NONE, reason, apply)


def skip(reason: str, *keys: str) -> Rule:
    """Keys that are not needed here: nothing is lost without them."""

    def apply(account: Account) -> None:
        for key in filter(account.has, keys):
            account.unneeded(key, reason)

    return Rule(keys, NONE, reason, apply)


def differ(reason: str, *keys: str) -> Rule:
    """Keys whose effect here is another one, without a key of ours."""

    def apply(account: Account) -> None:
        for key in filter(account.has, keys):
            if is_on(account.get(key)):
                account.differs(key, reason)
            else:
                account.unneeded(key, "switched off there, and not done here")

    return Rule(keys, NONE, reason, apply)
