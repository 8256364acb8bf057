"""Plain containers into dataclasses and back, with every fault named: the strict half of the configuration.

Hydra's own schema stops at the first fault, advises a `+` that turns a typo into an accepted key, and knows no
`Literal`; this is the same check by hand.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from sftdist.core.migrations import advice

T = TypeVar("T")
ANY_NAME = "<name>"
_SWITCHES = {**dict.fromkeys(("yes", "on", "y", "1"), "true"), **dict.fromkeys(("no", "off", "n", "0"), "false")}
MISSING = "???"
_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}  # what a tensor can hold

# What other trainers call it, by the last word of the key.
PEERS_NAMES = {
    "learning_rate": "optimizer.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": "train.packs_per_step",
    "per_device_train_batch_size": "train.packs_per_step",
    "micro_batch_size": "train.packs_per_step",
    "gradient_accumulation_steps": "train.packs_per_step",
    "max_seq_length": "data.max_len",
    "max_seq_len": "data.max_len",
    "max_length": "data.max_len",
    "sequence_len": "data.max_len",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "bf16": "precision",
    "fp16": "precision",
    "lora_r": "tune.r",
    "lora_alpha": "tune.alpha",
    "lora_dropout": "tune.dropout",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "eval.every_steps",
    "output_dir": "run.dir",
    "gradient_checkpointing": "model.activation_checkpointing",
    "experiment": "exp",
    "preset": "exp",
    "config": "exp",
}


def build(schema: type[T], value: Mapping[str, Any], issues: list[str]) -> T:
    """The dataclass that a mapping describes; each fault is added to `issues` and its default used instead."""
    return cast(T, _Builder(schema, issues).dataclass(schema, value, ""))


def to_plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as mappings, strings and lists, which JSON and YAML can hold."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def options(schema: type, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """`(key, type, default)` of every option, in the order of the file; `<name>` stands for any name."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, key = hints[field.name], prefix + field.name
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        element = get_args(hint)[1] if get_origin(hint) is dict else None
        if dataclasses.is_dataclass(hint):
            yield from options(cast(type, hint), f"{key}.")
        elif dataclasses.is_dataclass(element):
            yield from options(cast(type, element), f"{key}.{ANY_NAME}.")
        else:
            yield key, words_of(hint), to_plain(default)


def words_of(hint: Any) -> str:
    """A type in the user's words."""
    if hint is Any:
        return "anything"
    if isinstance(hint, UnionType):
        return " or ".join(words_of(part) for part in get_args(hint) if part is not NoneType) + " or null"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return "one of " + ", ".join(hint)
    if get_origin(hint) is list:
        return "a list, each " + words_of(get_args(hint)[0])
    if get_origin(hint) is dict or dataclasses.is_dataclass(hint):
        return "a section, such as {key:value}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names[hint]


def nearest(key: str, known: list[str]) -> str | None:
    """The valid key that a wrong one most likely means: by another trainer's name, by its last word, by its section."""
    key = key.lower()
    parent, _, leaf = key.rpartition(".")
    if leaf in PEERS_NAMES:
        return PEERS_NAMES[leaf]

    def likeness(candidate: str) -> float:
        section, _, name = candidate.rpartition(".")
        same_section = 0.15 if section == parent else 0.0
        return max(
            SequenceMatcher(None, leaf, name).ratio() + same_section, SequenceMatcher(None, key, candidate).ratio()
        )

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.7 else None


class _Builder:
    def __init__(self, schema: type, issues: list[str]) -> None:
        self.issues = issues
        self.known = [key for key, _, _ in options(schema)]

    def dataclass(self, schema: type, value: Any, path: str) -> Any:
        made = schema()
        if value is None:
            return made
        if not isinstance(value, Mapping):
            self.issues.append(f"{path}: given {shown(value)}, required a section; {_meant_key(schema, value, path)}")
            return made
        hints = get_type_hints(schema)
        for key, item in value.items():
            full = f"{path}.{key}" if path else str(key)
            if key not in hints:
                self.unknown(full, path, item)
                continue
            default = getattr(made, key)
            setattr(made, key, self.value(hints[key], item, full, default))
        return made

    def unknown(self, key: str, section: str, value: Any) -> None:
        """A key that is none, or all that is below it."""
        known, parent = self.known, section.rpartition(".")[0]
        if parent:
            known = [name.replace(f"{parent}.{ANY_NAME}", section) for name in known]
        for leaf in _leaves(key, value):
            near = nearest(leaf, known)
            meant = f"did you mean {near}?" if near else "see --help for all keys"
            self.issues.append(advice(leaf) or f"{leaf}: unknown key; {meant}")

    def value(self, hint: Any, value: Any, path: str, default: Any) -> Any:
        """`value` as `hint` says, or `default` after an issue."""
        if value == MISSING:
            self.issues.append(f"{path}: given {MISSING}, which marks a value that must be set; give {path}=...")
            return default
        if hint is Any:
            return value
        if isinstance(hint, UnionType):
            if value is None:
                return None
            (hint,) = (part for part in get_args(hint) if part is not NoneType)
        if dataclasses.is_dataclass(hint):
            return self.dataclass(cast(type, hint), value, path)
        if get_origin(hint) is dict and isinstance(value, Mapping):
            element = get_args(hint)[1]
            return {str(key): self.value(element, item, f"{path}.{key}", None) for key, item in value.items()}
        if get_origin(hint) is list and isinstance(value, list):
            (element,) = get_args(hint)
            before = len(self.issues)
            items = [self.value(element, item, f"{path}[{index}]", None) for index, item in enumerate(value)]
            return items if len(self.issues) == before else default
        found = _convert(hint, value)
        if found is None:
            self.issues.append(f"{path}: given {shown(value)}, required {words_of(hint)}{_meant(hint, value, path)}")
            return default
        return found


def _leaves(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping) or not value:
        yield key
        return
    for name, item in value.items():
        yield from _leaves(f"{key}.{name}", item)


def _convert(hint: Any, value: Any) -> Any:
    """`value` as one of the scalar types, or None where it is none of that type."""
    if isinstance(value, bool):
        return value if hint is bool else None
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(value) if value in list(hint) else None
    if hint is str and isinstance(value, str | int):
        return str(value)
    if hint not in _LARGEST:
        return None
    if not isinstance(value, int | float) or not abs(value) <= _LARGEST[hint]:  # not: nan too
        return None
    if hint is int and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint is float:
        return float(value)
    return None


def _meant(hint: Any, value: Any, path: str) -> str:
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        close = get_close_matches(str(value), list(hint), n=1)
        return f"; did you mean {close[0]}?" if close else ""
    if hint is bool and str(value).lower() in _SWITCHES:
        return f"; did you mean {_SWITCHES[str(value).lower()]}?"
    if get_origin(hint) is list and not isinstance(value, Mapping):
        return f"; write {path}=[{value}]"
    if hint in _LARGEST and isinstance(value, int | float) and abs(value) > _LARGEST[hint]:
        return f" of at most {_LARGEST[hint]:.3g}"
    return '; put it in quotes, "..."' if hint is str and isinstance(value, float) else ""


def _meant_key(schema: type, value: Any, path: str) -> str:
    """The first key of a section that could hold a value which was given for the section itself. Words hold anything:
    a number is meant for one that holds numbers."""
    hints = get_type_hints(schema)
    scalars = {
        name: next((part for part in get_args(hint) if part is not NoneType), hint) for name, hint in hints.items()
    }
    fitting = [name for name, kind in scalars.items() if kind is Any or _convert(kind, value) is not None]
    if fitting:
        best = next((name for name in fitting if isinstance(value, str) or scalars[name] is not str), fitting[0])
        return f"did you mean {path}.{best}={value}?"
    return f"its keys are {', '.join(f'{path}.{name}' for name in hints)}"


def shown(value: Any) -> str:
    """A value as an issue shows it: on one line, not too long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
