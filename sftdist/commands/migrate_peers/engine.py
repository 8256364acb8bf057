"""Precision, DeepSpeed and FSDP, recomputation, compilation: how a step is computed, not what it computes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sftdist.commands.migrate_peers.account import Account, is_on, whole, wrong
from sftdist.commands.migrate_peers.rule import Rule
from sftdist.core.errors import ConfigError

_STAGE = re.compile(r"(?:zero|z|stage)[-_]?([0-3])")


def precision(bf16: tuple[str, ...], fp16: tuple[str, ...], *, default: str, further: tuple[str, ...] = ()) -> Rule:
    """bf16, fp16 or fp32; `further`: keys of the weights' type, which are fp32 here whatever the precision."""

    def apply(account: Account) -> None:
        low = next((key for key in bf16 if is_on(account.get(key))), None)
        half = next((key for key in fp16 if is_on(account.get(key))), None)
        off = any(account.has(key) and not is_on(account.get(key)) for key in bf16)
        ours = "bf16" if low else "fp16" if half else default if default != "bf16" or not off else "fp32"
        account.put("precision", ours, low or half or "what is taken there")
        for key in filter(account.has, (*bf16, *fp16)):
            if key in (low, half):
                account.carry(key, "precision", ours)
            else:
                account.unneeded(key, f"precision={ours}")
        for key in filter(account.has, further):
            account.differs(key, f"given {account.get(key)}; trained weights are fp32 here, products in the precision")

    return Rule((*bf16, *fp16, *further), "precision", "bf16, fp16 or fp32, over fp32 weights", apply)


def deepspeed() -> Rule:
    """A DeepSpeed file, or the mapping itself: its stage, and what it offloads."""

    def apply(account: Account) -> None:
        if not account.has("deepspeed"):
            return
        given = account.get("deepspeed")
        settings = given if isinstance(given, Mapping) else _read(account, str(given))
        if settings is None:
            _by_name(account, str(given))
            return
        zero = _section(settings, "zero_optimization")
        account.carry("deepspeed", "zero.stage", whole("deepspeed: zero_optimization.stage", zero.get("stage", 0)))
        if is_on(_section(zero, "offload_optimizer").get("device")):
            account.carry("deepspeed", "zero.offload", "optimizer")
        if is_on(_section(zero, "offload_param").get("device")):
            account.left("deepspeed", "offload_param; weights stay on the GPUs here")
        account.differs(
            "deepspeed", "its other keys are left out: sizes follow from the model; zero.deepspeed takes more"
        )

    return Rule(("deepspeed",), "zero.stage, zero.offload", "the stage and the offloading of its file", apply)


def _section(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise wrong(f"deepspeed: {key}", found, "a mapping")
    return found


def _read(account: Account, given: str) -> dict[str, Any] | None:
    path = account.folder / given
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"deepspeed: {path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"deepspeed: {path}: given a {type(found).__name__}, required an object of settings")
    return found


def _by_name(account: Account, given: str) -> None:
    found = _STAGE.search(given.lower())
    if found is None:
        account.left("deepspeed", f"given {given}, a file that is not there; set zero.stage (2 is taken)")
        return
    account.carry("deepspeed", "zero.stage", int(found[1]), "by its name: the file is not there")
    if "offload" in given.lower():
        account.carry("deepspeed", "zero.offload", "optimizer", "by its name: the file is not there")


def fsdp(*further: str) -> Rule:
    """Fully sharded parameters are ZeRO 3; `further`: keys that only say how."""

    def apply(account: Account) -> None:
        settings = account.get("fsdp_config")
        for key in filter(account.has, ("fsdp", "fsdp_config")):
            if is_on(account.get(key)):
                account.carry(key, "zero.stage", 3, "fully sharded")
            else:
                account.unneeded(key, "switched off there, and not done here")
        offload = [
            key
            for key in ("offload_params", "fsdp_offload_params")
            if isinstance(settings, Mapping) and is_on(settings.get(key))
        ]
        if offload or "offload" in str(account.get("fsdp", "")):
            account.put("zero.offload", "optimizer", "fsdp offloads")
            account.differs(
                account.first(("fsdp_config", "fsdp")) or "fsdp", "offloads weights; here the optimizer's state"
            )
        for key in filter(account.has, further):
            account.unneeded(key, "how FSDP goes about it; ZeRO has no such choice")

    return Rule(("fsdp", "fsdp_config", *further), "zero.stage=3", "fully sharded is ZeRO 3", apply)


def recomputation(
    key: str,
    *,
    default: bool,
    further: tuple[str, ...] = (),
    earlier: str | None = None,
    inverted: bool = False,
) -> Rule:
    """Recomputed activations; the bits are the same. `earlier`: the key's earlier name; `inverted`: it switches off."""
    names = (key, earlier) if earlier else (key,)

    def apply(account: Account) -> None:
        given = account.first(names)
        found = default if given is None else is_on(account.get(given)) != inverted
        if given is None and default:
            account.default(key, "model.activation_checkpointing", True)
        for name in filter(account.has, names):
            account.carry(name, "model.activation_checkpointing", found)
        for name in filter(account.has, further):
            account.unneeded(name, "how it goes about it; the bits are the same")

    return Rule((*names, *further), "model.activation_checkpointing", "the same", apply)


def compilation(*further: str) -> Rule:
    """torch.compile, here one layer at a time."""

    def apply(account: Account) -> None:
        if account.has("torch_compile"):
            account.carry("torch_compile", "model.compile", is_on(account.get("torch_compile")))
        for key in filter(account.has, further):
            account.unneeded(key, "layers are compiled one at a time, in torch's default way")

    return Rule(("torch_compile", *further), "model.compile", "the same, one layer at a time", apply)
