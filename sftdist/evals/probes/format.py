"""Whether an answer has the form that was asked for: JSON under a schema, a table, a pattern, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from sftdist.core.errors import ConfigError, DataError
from sftdist.data.answer_rules import RULES, Check, Fault, TooSlow, parse_json
from sftdist.data.answer_schema import schema_check
from sftdist.data.rowerror import show
from sftdist.evals.metrics import Metric, Probe
from sftdist.evals.probes.same_json import plain
from sftdist.evals.probes.table import table_check
from sftdist.evals.probes.tools import calls_in, wanted_calls
from sftdist.evals.prompts import Answer, Prompt

METRICS = (
    Metric("json_valid", True, 0.0, 1.0, "share of answers that are JSON and nothing else, where JSON is asked for"),
    Metric("schema_valid", True, 0.0, 1.0, "share of answers that are JSON and valid under the schema"),
    Metric("required_keys", True, 0.0, 1.0, "share of answers that are a JSON object with every required key"),
    Metric("fields_right", True, 0.0, 1.0, "share of the reference's fields that the answer has with the same value"),
    Metric("table_valid", True, 0.0, 1.0, "share of answers with a markdown table of the form that is asked for"),
    Metric("regex_match", True, 0.0, 1.0, "share of answers in which every required pattern is found"),
    Metric("tool_calls_right", True, 0.0, 1.0, "share of answers that make the right calls with the right arguments"),
)


def format_probe(schemas: Mapping[str, dict[str, Any]] | None = None) -> Probe:
    """Form where it is asked for: `schemas` by source, and a prompt's own checks.

    `schema` is a JSON Schema (draft 2020-12 unless it names another) and stands before the source's; `required_keys` a
    list of names; `table` true or an object, see `probes.table`; `regex` a pattern or a list; `tool_calls` a list of
    calls. A reference that is JSON asks for JSON. Raises ConfigError for a schema that cannot be checked.
    """
    of_source = {source: _of_source(source, schema) for source, schema in (schemas or {}).items()}

    def rules(prompt: Prompt) -> dict[str, Check]:
        return _rules(prompt, of_source.get(prompt.source))

    def score(prompt: Prompt, answer: Answer) -> dict[str, float]:
        found = {name: float(not _breaches(prompt, check, answer.spoken)) for name, check in rules(prompt).items()}
        return found | _beside_reference(prompt, answer.spoken, "schema_valid" in found)

    def check(prompt: Prompt) -> None:
        rules(prompt)
        _required_keys(prompt)
        wanted_calls(prompt)

    def explain(prompt: Prompt, answer: Answer) -> list[str]:
        return [text for one in rules(prompt).values() for text in _breaches(prompt, one, answer.spoken)]

    return Probe("format", METRICS, score, check, explain)


def _of_source(source: str, schema: dict[str, Any]) -> Check:
    try:
        return schema_check(schema)
    except Fault as fault:
        raise ConfigError(f"evals.schemas.{source}{fault}") from None


# --- rules that an answer keeps or breaks ----------------------------------------------------------------------

_MAKERS: dict[str, tuple[str, Callable[[Any], Check]]] = {
    "schema": ("schema_valid", schema_check),
    "table": ("table_valid", table_check),
    "regex": ("regex_match", RULES["required"]),
}


def _rules(prompt: Prompt, of_source: Check | None) -> dict[str, Check]:
    """The checks that apply to a prompt, by metric."""
    found = {} if of_source is None else {"schema_valid": of_source}
    for key, (metric, _) in _MAKERS.items():
        if key in prompt.checks:
            found[metric] = _made(prompt, key)
    return found


def _made(prompt: Prompt, key: str) -> Check:
    value = prompt.checks[key]
    try:
        return _made_once(key, json.dumps(value))
    except Fault as fault:
        raise DataError(f"{prompt.id}: checks.{key}{fault}") from None
    except TypeError:
        raise DataError(f"{prompt.id}: checks.{key}: given {show(value)}, required what JSON can hold") from None


@lru_cache(maxsize=256)
def _made_once(key: str, value: str) -> Check:
    """A schema takes milliseconds to read, and mostly all rows of a source have the same."""
    return _MAKERS[key][1](json.loads(value))


def _breaches(prompt: Prompt, check: Check, answer: str) -> list[str]:
    try:
        return [str(breach).removeprefix("rules.") for breach in check(answer)]
    except TooSlow as problem:
        raise DataError(f"{prompt.id}: {problem}") from None


# --- values beside those of the reference ------------------------------------------------------------------------


def _beside_reference(prompt: Prompt, answer: str, has_schema: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    if (calls := wanted_calls(prompt)) is not None:
        return {"tool_calls_right": float(calls_in(answer) == calls)}
    wanted = None if prompt.reference is None else parse_json(prompt.reference)[0]
    keys = _required_keys(prompt)
    given, wrong = parse_json(answer)
    if has_schema or keys is not None or isinstance(wanted, dict | list):
        found["json_valid"] = float(wrong is None)
    if keys is not None:
        found["required_keys"] = float(isinstance(given, dict) and all(key in given for key in keys))
    if isinstance(wanted, dict) and wanted:
        found["fields_right"] = fields_right(given, wanted)
    return found


def fields_right(given: Any, wanted: Mapping[str, Any]) -> float:
    """The share of the wanted fields that an answer has with the same value; 0.0 where it is no JSON object."""
    if not isinstance(given, dict):
        return 0.0
    return sum(key in given and _same(given[key], wanted[key]) for key in wanted) / len(wanted)


def _same(given: Any, wanted: Any) -> bool:
    try:
        return plain(given) == plain(wanted)
    except RecursionError:
        return False


def _required_keys(prompt: Prompt) -> list[str] | None:
    keys = prompt.checks.get("required_keys")
    if keys is None:
        return None
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise DataError(f"{prompt.id}: checks.required_keys: given {show(keys)}, required a list of names")
    return keys
