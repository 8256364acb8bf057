"""A source's contract: what its answers must be, checked on training answers and on a model's with the same file.

It needs no model library: whoever has a text can check it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.data.answer_rules import RULES, UNITS, Breach, Check, Fault, TooSlow, meant, unknown
from sftdist.data.answer_schema import schema_check
from sftdist.data.contract_file import read_contract_file, read_file

__all__ = ["Breach", "Contract"]

CONTRACT_VERSION = 1  # grows whenever the same contract may say something else of an answer
KEYS = ("schema", "rules", "guideline")


@dataclass(frozen=True)
class Contract:
    """A contract that has been read.

    The file is YAML: `schema`, a JSON Schema or the name of a file with one; `rules`, see `answer_rules.RULES`;
    `guideline`, the name of a document that says the same in words. Names are relative to the contract's folder.
    `sha256` is that of everything an answer is checked against, `guideline_sha256` that of the document.
    """

    path: Path
    sha256: str
    guideline: Path | None
    guideline_sha256: str | None
    checks: tuple[Check, ...]

    @classmethod
    def load(cls, path: Path) -> Contract:
        """Read a contract and whatever it names. Raises a ConfigError with everything that is wrong in it."""
        content = read_file(path)
        values, issues = read_contract_file(path, content), list[str]()
        issues += [unknown(str(key), KEYS, _elsewhere(str(key))) for key in values if key not in KEYS]
        checks: list[Check] = []
        digest = hashlib.sha256(content)
        if (schema := values.get("schema")) is not None:
            with_schema = _collect(issues, "schema", lambda: _schema(path.parent, schema, digest.update))
            checks += [with_schema] if with_schema else []
        rules = values.get("rules")
        checks += _rules(rules, issues)
        if schema is not None and isinstance(rules, dict) and rules.get("json_only") is False:
            issues.append("rules.json_only: given false beside a schema, which takes JSON alone; remove one of them")
        guideline = None if values.get("guideline") is None else path.parent / str(values["guideline"])
        document = _collect(issues, "guideline", lambda: None if guideline is None else read_file(guideline))
        if not any(values.get(key) is not None for key in KEYS):
            issues.append(f"given nothing to check, required one of {', '.join(KEYS)}")
        if issues:
            raise ConfigError([f"{path}: {issue}" for issue in issues])
        found = None if document is None else hashlib.sha256(document).hexdigest()
        return cls(path, digest.hexdigest(), guideline, found, tuple(checks))

    def breaches(self, answer: str) -> list[Breach]:
        """What an answer breaks, at most one breach of each rule. Raises ConfigError for a rule that takes too long."""
        try:
            return [breach for check in self.checks for breach in check(answer)]
        except TooSlow as problem:
            raise ConfigError(f"{self.path}: {problem}") from None


def _schema(folder: Path, value: Any, see: Callable[[bytes], None]) -> Check:
    if isinstance(value, str):
        file = folder / value
        content = read_file(file)
        see(content)
        value = read_contract_file(file, content)
    return schema_check(value)


def _rules(values: Any, issues: list[str]) -> list[Check]:
    if values is None:
        return []
    if not isinstance(values, dict):
        issues.append(f"rules: given {type(values).__name__}, required a section such as 'max_words: 200'")
        return []
    issues += [f"rules.{unknown(key, RULES, meant(key))}" for key in values if key not in RULES]
    known = {key: value for key, value in values.items() if key in RULES and value is not None}
    found = [_collect(issues, f"rules.{key}", partial(RULES[key], value)) for key, value in known.items()]
    for unit in UNITS:
        low, high = known.get(f"min_{unit}"), known.get(f"max_{unit}")
        if isinstance(low, int) and isinstance(high, int) and low > high:
            issues.append(f"rules.min_{unit}: given {low}, required at most the {high} of max_{unit}")
    return [check for check in found if check is not None]


def _elsewhere(key: str) -> str | None:
    """A rule that stands beside `rules` instead of in it."""
    return f"rules.{key}" if key in RULES else None


def _collect(issues: list[str], key: str, make: Callable[[], Any]) -> Any:
    """What is made, or None after an issue."""
    try:
        return make()
    except Fault as fault:
        issues.append(f"{key}{fault}")
    except ConfigError as problem:
        issues += [f"{key}: {issue}" for issue in problem.issues]
    return None
