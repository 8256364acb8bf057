"""LoRA: its rank, its targets and its kinds; and the four-bit base of QLoRA."""

from __future__ import annotations

import re
from collections.abc import Callable

from sftdist.commands.migrate_peers.account import Account, is_on, number, whole, words
from sftdist.commands.migrate_peers.rule import NONE, Rule

ALL = ("all", "all-linear", "all_linear")
# What PEFT takes where nobody says, for Llama, Mistral, Qwen, Gemma and most of their kind.
USUAL = ["q_proj", "v_proj"]
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def of_adapters(rules: tuple[Rule, ...], has_adapter: Callable[[Account], bool]) -> tuple[Rule, ...]:
    """The rules of an adapter's keys, which say nothing where the job has none."""

    def guarded(rule: Rule) -> Rule:
        def apply(account: Account) -> None:
            if has_adapter(account):
                rule.apply(account)
                return
            for key in filter(account.has, rule.keys):
                account.unneeded(key, "the job has no adapter")

        return Rule(rule.keys, rule.ours, rule.about, apply)

    return tuple(map(guarded, rules))


def rank(key: str, *, default: int) -> Rule:
    def apply(account: Account) -> None:
        if account.has(key):
            account.carry(key, "tune.r", whole(key, account.get(key)))
        else:
            account.default(key, "tune.r", default)

    return Rule((key,), "tune.r", "the same", apply)


def alpha(key: str, *, default: float | None = None) -> Rule:
    """`default` None: twice the rank."""

    def apply(account: Account) -> None:
        if account.has(key):
            account.carry(key, "tune.alpha", number(key, account.get(key)))
        else:
            account.default(key, "tune.alpha", 2.0 * account.values["tune.r"] if default is None else default)

    return Rule((key,), "tune.alpha", "the same", apply)


def target(key: str, *, default: list[str] | str, all_key: str | None = None) -> Rule:
    """Names of modules, or all linear layers; `all_key`: a switch for all of them."""
    keys = (key, all_key) if all_key else (key,)

    def apply(account: Account) -> None:
        if all_key and is_on(account.get(all_key)):
            account.carry(all_key, "tune.target", "all-linear")
            if account.has(key):
                account.unneeded(key, f"{all_key} takes all of them")
            return
        if all_key and account.has(all_key):
            account.unneeded(all_key, "switched off; the list decides")
        if not account.has(key):
            account.default(key, "tune.target", default)
            if default == USUAL:
                account.differs(
                    f"({key})", f"PEFT chooses by the family there; tune.target={default} is what most have"
                )
            return
        names = words(key, account.get(key))
        if len(names) == 1 and names[0] in ALL:
            account.carry(key, "tune.target", "all-linear")
        elif all(map(_NAME.fullmatch, names)) and names:
            account.carry(key, "tune.target", names)
        else:
            account.put("tune.target", "all-linear", f"instead of {key}")
            account.left(key, f"given {account.get(key)}, a pattern; tune.target takes names, so all-linear is taken")

    return Rule(keys, "tune.target", "the same; all linear layers are all-linear", apply)


def bits(
    *, method_key: str, four: Callable[[Account], bool], eight: Callable[[Account], bool], keys: tuple[str, ...]
) -> Rule:
    """A base in four bits makes LoRA QLoRA; `method_key` is named as the reason."""

    def apply(account: Account) -> None:
        low = four(account)
        if low:
            account.put("tune.method", "qlora", f"{method_key}, in four bits")
        for key in filter(account.has, keys):
            if not is_on(account.get(key)):
                account.unneeded(key, "switched off there, and not done here")
            elif low:
                account.carry(key, "tune.method", "qlora")
            elif eight(account):
                account.differs(key, "eight bits; LoRA here lies beside a base in bf16, QLoRA beside one in four bits")
            else:
                account.left(key, "four bits without an adapter; that is for inference")

    return Rule(keys, "tune.method=qlora", "four bits are QLoRA; eight bits become bf16", apply)


def nested_quantisation(key: str, *, default: bool) -> Rule:
    """Whether the constants of the four-bit blocks are quantised, too."""

    def apply(account: Account) -> None:
        if account.values.get("tune.method") != "qlora":
            if account.has(key):
                account.unneeded(key, "nothing is in four bits")
        elif account.has(key):
            account.carry(key, "tune.double_quant", is_on(account.get(key)))
        else:
            account.default(key, "tune.double_quant", default)

    return Rule((key,), "tune.double_quant", "the same", apply)


def further_weights(key: str) -> Rule:
    """Whole layers that are trained beside the adapter."""

    def apply(account: Account) -> None:
        if account.has(key):
            account.left(key, f"given {account.get(key)}; only the adapter is trained here")

    return Rule((key,), NONE, "layers that are trained whole beside the adapter", apply)
