"""The form of answers: JSON, schemas, tables, patterns, calls of tools."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sftdist.core.errors import ConfigError, DataError
from sftdist.data import answer_rules
from sftdist.data.message import Message
from sftdist.evals.probes.format import format_probe
from sftdist.evals.prompts import Answer, Prompt

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "urgent": {"type": "boolean"}},
    "required": ["n", "urgent"],
    "additionalProperties": False,
}


def asked(reference: str | None = None, source: str = "s", **checks: Any) -> Prompt:
    return Prompt("s/1", source, (Message("user", "Hi"),), reference, checks=checks)


def scores(answer: str, prompt: Prompt, schemas: dict[str, Any] | None = None) -> dict[str, float]:
    return format_probe(schemas).score(prompt, Answer(answer, 1, True))


# --- JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "json_valid", "schema_valid"),
    [
        ('{"n": 1, "urgent": true}', 1.0, 1.0),
        (' {"n": 1.0, "urgent": true}\n', 1.0, 1.0),
        ('{"n": 1, "urgent": true} and more', 0.0, 0.0),
        ('```json\n{"n": 1, "urgent": true}\n```', 0.0, 0.0),
        ('{"n": 1, "urgent": true', 0.0, 0.0),
        ('{"n": NaN, "urgent": true}', 0.0, 0.0),
        ('{"n": 1, "n": 1, "urgent": true}', 0.0, 0.0),
        ('{"n": "1", "urgent": true}', 1.0, 0.0),
        ('{"n": 1}', 1.0, 0.0),
        ('{"n": 1, "urgent": true, "x": 0}', 1.0, 0.0),
        ("[1]", 1.0, 0.0),
        ("", 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
    ],
)
def test_json_and_schema(answer: str, json_valid: float, schema_valid: float) -> None:
    wanted = {"json_valid": json_valid, "schema_valid": schema_valid}
    assert scores(answer, asked(schema=SCHEMA)) == wanted
    assert scores(answer, asked(), {"s": SCHEMA}) == wanted


def test_the_schema_of_a_prompt_stands_before_that_of_its_source() -> None:
    assert scores("3", asked(schema={"type": "integer"}), {"s": SCHEMA})["schema_valid"] == 1.0
    assert scores("3", asked(source="other"), {"s": SCHEMA}) == {}
    assert format_probe({"s": SCHEMA}).explain(asked(), Answer("{}", 1, True))[0].startswith("schema/required: given")


def test_draft_2020_12_is_what_a_schema_is_read_as() -> None:
    pair = {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False}
    assert scores('["a", 1]', asked(schema=pair))["schema_valid"] == 1.0
    assert scores('["a", 1, 2]', asked(schema=pair))["schema_valid"] == 0.0


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ('{"n": 1, "urgent": true, "who": {"a": 1, "b": [1, 2]}}', 1.0),
        ('{"who": {"b": [1, 2], "a": 1.0}, "urgent": true, "n": 1.0, "more": 0}', 1.0),
        ('{"n": true, "urgent": 1, "who": null}', 0.0),
        ('{"n": "1", "urgent": true, "who": {"a": 1, "b": [2, 1]}}', 1 / 3),
        ("[]", 0.0),
        ("no JSON", 0.0),
        ('{"n": ' + "[" * 400 + "]" * 400 + "}", 0.0),
    ],
)
def test_fields_are_compared_one_by_one_with_their_type(answer: str, share: float) -> None:
    reference = '{"n": 1, "urgent": true, "who": {"a": 1, "b": [1, 2]}}'
    assert scores(answer, asked(reference))["fields_right"] == pytest.approx(share)


def test_json_is_asked_for_where_the_reference_is_json() -> None:
    assert scores("no", asked('{"a": 1}')) == {"json_valid": 0.0, "fields_right": 0.0}
    assert scores("[]", asked("[1]")) == {"json_valid": 1.0}
    assert scores("no", asked("42")) == {}
    assert scores("no", asked("Yes.")) == {}
    assert scores("{}", asked("{}")) == {"json_valid": 1.0}


def test_required_keys() -> None:
    assert scores('{"a": null, "b": 1}', asked(required_keys=["a", "b"])) == {"json_valid": 1.0, "required_keys": 1.0}
    assert scores('{"a": 1}', asked(required_keys=["a", "b"]))["required_keys"] == 0.0
    assert scores('["a", "b"]', asked(required_keys=["a", "b"]))["required_keys"] == 0.0


# --- tables and patterns -------------------------------------------------------------------------------------

TABLE = "| name | price |\n|:---|---:|\n| lamp | 3 |\n| a \\| b | 4 |"


@pytest.mark.parametrize(
    ("answer", "contract", "valid"),
    [
        (TABLE, True, 1.0),
        (f"Here it is:\n\n{TABLE}\n\nBye", True, 1.0),
        ("name | price\n--- | ---\nlamp | 3", True, 1.0),
        (TABLE, {"columns": ["name", "price"], "min_rows": 2, "max_rows": 2, "only": True}, 1.0),
        (f"\n{TABLE}\n", {"only": True}, 1.0),
        (f"Here it is:\n{TABLE}", {"only": True}, 0.0),
        (f"{TABLE}\nBye", {"only": True}, 0.0),
        (TABLE, {"columns": ["price", "name"]}, 0.0),
        (TABLE, {"min_rows": 3}, 0.0),
        (TABLE, {"max_rows": 1}, 0.0),
        ("| name | price |\n|---|---|\n| lamp |", True, 0.0),
        ("| name | price |\n|---|---|\n| lamp | 3 | 4 |", True, 0.0),
        ("| name | price |\n|---|\n| lamp | 3 |", True, 0.0),
        ("| name | price |\n| lamp | 3 |", True, 0.0),
        ("a\n---\nb", True, 0.0),  # a headline
        ("", True, 0.0),
        ("|" * 200_000, True, 0.0),
    ],
)
def test_tables(answer: str, contract: object, valid: float) -> None:
    assert scores(answer, asked(table=contract)) == {"table_valid": valid}


def test_patterns_are_all_to_be_found() -> None:
    assert scores("ticket #12", asked(regex=r"#\d+")) == {"regex_match": 1.0}
    assert scores("ticket #12", asked(regex=[r"#\d+", "^ticket"])) == {"regex_match": 1.0}
    assert scores("a ticket #12", asked(regex=[r"#\d+", "^ticket"])) == {"regex_match": 0.0}


# --- calls of tools ---------------------------------------------------------------------------------------------

CALL = {"name": "find", "arguments": {"city": "Rome", "days": 2}}
OTHER = {"name": "stop", "arguments": {}}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", 1.0),
        (f"I look.\n<tool_call>{json.dumps(CALL)}</tool_call>", 1.0),
        (json.dumps(CALL), 1.0),
        (json.dumps([{"id": "1", "type": "function", "function": CALL}]), 1.0),
        (json.dumps({"name": "find", "parameters": {"days": 2.0, "city": "Rome"}}), 1.0),
        ("<|python_tag|>" + json.dumps({"name": "find", "parameters": CALL["arguments"]}), 1.0),
        ("[TOOL_CALLS]" + json.dumps([{"name": "find", "arguments": json.dumps(CALL["arguments"])}]), 1.0),
        (f"<tool_call>{json.dumps(CALL)}", 1.0),
        (json.dumps({"name": "find", "arguments": {"city": "Rome"}}), 0.0),
        (json.dumps({"name": "find", "arguments": {"city": "Rome", "days": "2"}}), 0.0),
        (json.dumps({"name": "search", "arguments": CALL["arguments"]}), 0.0),
        (json.dumps([CALL, CALL]), 0.0),
        (json.dumps([CALL, OTHER]), 0.0),
        ("<tool_call>find(Rome)</tool_call>", 0.0),
        ("Rome is fine for 2 days.", 0.0),
        ("", 0.0),
        ("[]", 0.0),
        ("<tool_call>" * 50_000, 0.0),
    ],
)
def test_calls_of_tools(answer: str, right: float) -> None:
    assert scores(answer, asked(json.dumps([CALL]), tool_calls=[CALL])) == {"tool_calls_right": right}


def test_calls_have_no_order_but_a_number() -> None:
    prompt = asked(tool_calls=[CALL, OTHER])
    assert scores(json.dumps([OTHER, CALL]), prompt)["tool_calls_right"] == 1.0
    assert scores(json.dumps([CALL]), prompt)["tool_calls_right"] == 0.0


# --- checks that no answer can be held against ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({"schema": {"type": "objekt"}}, "s/1: checks.schema.type: not a JSON Schema"),
        ({"schema": "ticket.json"}, 's/1: checks.schema: given "ticket.json", required a JSON Schema'),
        ({"schema": {1, 2}}, "s/1: checks.schema: given"),
        ({"required_keys": "a"}, 's/1: checks.required_keys: given "a", required a list of names'),
        ({"required_keys": []}, "s/1: checks.required_keys: given [], required"),
        ({"table": False}, "s/1: checks.table: given false, required true or an object"),
        ({"table": {"column": ["a"]}}, "s/1: checks.table: column: unknown key; did you mean columns?"),
        ({"table": {"columns": []}}, "s/1: checks.table.columns: given []"),
        ({"table": {"min_rows": -1}}, "s/1: checks.table.min_rows: given -1"),
        ({"table": {"only": 1}}, "s/1: checks.table.only: given 1"),
        ({"regex": "("}, 's/1: checks.regex: given "(", required a regular expression'),
        ({"tool_calls": [{"arguments": {}}]}, "s/1: checks.tool_calls[0].name: given nothing"),
        ({"tool_calls": []}, "s/1: checks.tool_calls: given [], required at least one call"),
        ({"tool_calls": "find"}, "s/1: checks.tool_calls: given"),
    ],
)
def test_a_check_that_cannot_be_carried_out(checks: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        format_probe().check(asked(**checks))


def test_the_schema_of_a_source_that_cannot_be_checked() -> None:
    with pytest.raises(ConfigError, match=r"evals\.schemas\.s: given the format ticket"):
        format_probe({"s": {"type": "string", "format": "ticket"}})


def test_a_pattern_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_rules, "PATTERN_SECONDS", 0.05)
    with pytest.raises(DataError, match=r"s/1: .*\(a\|a\)\+\$, which takes more than"):
        scores("a" * 60 + "b", asked(regex="(a|a)+$"))
    with pytest.raises(DataError, match="which takes more than"):
        scores(json.dumps("a" * 60 + "b"), asked(schema={"type": "string", "pattern": "(a|a)+$"}))


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(), max_size=100)
    | st.recursive(st.none() | st.integers() | st.floats(), st.lists).map(json.dumps)
)
@example("1e999")
@example("9" * 5_000)
@example('{"a": "\\ud800"}')
@example('{"a":' * 5_000)
def test_any_answer_has_scores(answer: str) -> None:
    checks: dict[str, Any] = {"required_keys": ["a"], "table": True, "regex": "^a", "schema": SCHEMA}
    for prompt in (asked('{"a": 1}', **checks), asked("[]", tool_calls=[CALL])):
        for name, value in scores(answer, prompt).items():
            assert 0.0 <= value <= 1.0, name
