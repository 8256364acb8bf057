"""Reading a contract's YAML so that it says what it seems to say.

YAML 1.1, which PyYAML reads, turns `no` into false, `12:30` into 750 and a date into an object, and lets the last of
two equal keys win. Here only `true` and `false` are switches, times and dates are text, and a key comes once (as in
YAML 1.2, https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sftdist.core.errors import ConfigError
from sftdist.core.snapshot import one_line

MAPPING, TAG = "tag:yaml.org,2002:map", "tag:yaml.org,2002:"
SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
}


class _Loader(yaml.SafeLoader):
    """The scalars above and no others; keys are text, each once."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as PyYAML declares it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no text", key_node.start_mark)
            if key_node.value in found:
                twice = f"the key {key_node.value} twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key_node.start_mark)
            found[key_node.value] = self.construct_object(value_node, deep=True)
        return found

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(node.value)


for _name, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(MAPPING, lambda loader, node: loader.construct_mapping(node))
_Loader.add_constructor(TAG + "int", _Loader.construct_int)
_Loader.add_constructor(TAG + "float", _Loader.construct_float)


def read_file(path: Path) -> bytes:
    """The bytes of a contract or of what it names. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: given a file that cannot be read ({error.strerror}), required one") from None


def read_contract_file(path: Path, content: bytes) -> dict[str, Any]:
    """The mapping in a file of YAML or JSON. Raises ConfigError."""
    try:
        values = yaml.load(content.decode("utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        found = one_line(error).replace('in "<unicode string>", ', "")
        advice = " (put patterns in single quotes)" if "escape" in found else ""
        raise ConfigError(f"{path}: not readable as YAML ({found}){advice}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: given {'nothing' if values is None else type(values).__name__}, required keys")
    return values
