"""A contract says what is wrong with an answer and which rule says so; one that would not be checked is refused."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sftdist.core.errors import ConfigError
from sftdist.core.settings import TrainOn
from sftdist.data import answer_rules
from sftdist.data.answer_rules import paragraphs_in, sentences_in, words_in
from sftdist.data.answers import trained_answers
from sftdist.data.contract import Contract
from sftdist.data.schema import Conversation, Message
from tests.conftest import ROOT

PRODUCT = """
schema:
  type: object
  required: [name, price]
  additionalProperties: false
  properties:
    name: {type: string, minLength: 1, pattern: '^[A-Z]'}
    price: {type: number, minimum: 0}
    on_sale: {enum: [yes, no]}
    since: {type: string, format: date}
    parts: {type: array, items: {$ref: '#/$defs/part'}}
  $defs:
    part: {type: object, required: [id], properties: {id: {type: integer}}}
"""


@pytest.fixture
def contract(tmp_path: Path) -> Any:
    def load(text: str) -> Contract:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return Contract.load(path)

    return load


def issues_of(load: Any, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text)
    return [issue.partition("c.yaml: ")[2] for issue in caught.value.issues]


# --- rules --------------------------------------------------------------------------------------------

ENGLISH = "Your parcel has left our warehouse and will be with you on Friday."
SPANISH = "Su paquete ha salido de nuestro almac\u00e9n y llegar\u00e1 el viernes por la ma\u00f1ana."
CASES = [
    ("max_words: 3", "one two  three\n", "one two three four", "max_words: given 4 words, required at most 3"),
    ("min_words: 2", "a b", "ab", "min_words: given 1 words, required at least 2"),
    ("max_characters: 3", "\u00e9\u00e9\u00e9", "abcd", "max_characters: given 4 characters, required at most 3"),
    ("min_characters: 1", "a", "", "min_characters: given 0 characters, required at least 1"),
    ("max_sentences: 1", "About 3.5 km, i.e.so", "No. Yes.", "max_sentences: given 2 sentences, required at most 1"),
    ("min_paragraphs: 2", "a\n \nb", "a\nb", "min_paragraphs: given 1 paragraphs, required at least 2"),
    ("language: en", ENGLISH, SPANISH, 'language: given es: "Su paquete ha salido de nuestro alma...'),
    ("language: [es, de]", SPANISH, ENGLISH, "required es or de"),
    ("json_only: true", ' {"a": [1]}\n', 'Sure! {"a": 1}', "json_only: given Expecting value at character 1"),
    ("json_only: true", "3", '```json\n{"a": 1}\n```', "required JSON and nothing else"),
    ("json_only: true", "null", '{"a": 1, "a": 2}', "the key twice"),
    ("json_only: true", "[]", '{"a": NaN}', "given NaN"),
    ("json_only: true", "[]", "[" * 100_000, "nested too deeply"),
    (
        "required: '#### -?\\d+$'",
        "x\n#### 72",
        "#### 72 apples",
        'required: given "#### 72 apples", required something',
    ),
    ("required: [a, b]", "ab", "a", 'required[1]: given "a", required something that matches b'),
    ("forbidden: '(?i)as an ai'", "fine", "As an AI, I", 'forbidden: given "As an AI" at character 1'),
    ("forbidden: [x, y]", "a", "ay", 'forbidden[1]: given "y" at character 2, required nothing that matches y'),
    ("starts_with: Dear", " Dear X", "Hi", 'starts_with: given "Hi", required "Dear"'),
    ("ends_with: [., '!']", "So!\n", "So?", 'ends_with: given "So?", required "." or "!"'),
    ("one_of: [yes, no]", "no\n", "No", 'one_of: given "No", required "yes" or "no"'),
]


@pytest.mark.parametrize(("rule", "good", "bad", "said"), CASES)
def test_each_rule_passes_what_keeps_it_and_says_what_does_not(
    contract: Any, rule: str, good: str, bad: str, said: str
) -> None:
    loaded = contract(f"rules: {{{rule}}}")
    assert loaded.breaches(good) == []
    (breach,) = loaded.breaches(bad)
    assert said in str(breach)
    assert breach.rule.startswith("rules." + rule.partition(":")[0])


def test_every_rule_has_a_case() -> None:
    assert {case[0].partition(":")[0] for case in CASES} >= {
        rule for rule in answer_rules.RULES if not rule.startswith(("min_", "max_"))
    }


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x + 1  # the sum of", "42", "", "OK", "\U0001f600" * 50, "x" * 9999]
)
def test_what_has_no_certain_language_breaks_no_rule_of_language(contract: Any, text: str) -> None:
    assert contract("rules: {language: de}").breaches(text) == []


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two! Three?", 3),
        ("It costs 3.50 in v2.1 of a.b", 1),
        ("1. first\n2. second\n- third", 3),
        ("\u4f60\u597d\u3002\u8c22\u8c22\uff01", 2),
        ('He said "No." Then he left...', 2),
        ("Wait... what?!", 2),
        ("\n\n---\n", 1),
    ],
)
def test_sentences(text: str, sentences: int) -> None:
    assert sentences_in(text) == sentences


@given(st.lists(st.lists(st.sampled_from(["a", "bc", "d1"]), min_size=1, max_size=4), max_size=4))
def test_counts_are_those_of_the_text_that_was_made(paragraphs: list[list[str]]) -> None:
    text = "\n\n".join(". ".join(words) + "." for words in paragraphs)
    words = sum(map(len, paragraphs))
    assert (words_in(text), sentences_in(text), paragraphs_in(text)) == (words, words, len(paragraphs))


def test_a_long_answer_is_shown_with_its_end(contract: Any) -> None:
    (breach,) = contract("rules: {required: '#### [0-9]+$'}").breaches("There are eight. " * 20 + "#### eight")
    assert breach.given == '"There are eight. There are eig" ... "t. There are eight. #### eight"'


def test_all_rules_are_told_at_once(contract: Any) -> None:
    found = contract("rules: {max_words: 1, forbidden: [b, c], json_only: true}").breaches("a b c")
    wanted = {"max_words", "json_only", "forbidden[0]", "forbidden[1]"}
    assert {breach.rule for breach in found} == {f"rules.{name}" for name in wanted}


# --- the schema -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ({"name": "Tea", "price": 3, "on_sale": "no", "since": "2024-02-29", "parts": [{"id": 1}]}, None),
        ({"name": "Tea"}, "schema/required"),
        ({"name": "Tea", "price": "3"}, "schema/properties/price/type"),
        ({"name": "tea", "price": 3}, "schema/properties/name/pattern"),
        ({"name": "Tea", "price": 3, "x": 1}, "schema/additionalProperties"),
        ({"name": "Tea", "price": 3, "on_sale": False}, "schema/properties/on_sale/enum"),  # YAML 1.1 says it may
        ({"name": "Tea", "price": 3, "since": "2023-02-29"}, "schema/properties/since/format"),
        ({"name": "Tea", "price": 3, "parts": [{"id": 1}, {"id": "2"}]}, "schema/properties/parts/items/properties/id"),
    ],
)
def test_answers_against_a_schema(contract: Any, answer: Any, rule: str | None) -> None:
    found = contract(PRODUCT).breaches(json.dumps(answer))
    assert [breach.rule for breach in found] == ([] if rule is None else [found[0].rule])
    assert rule is None or found[0].rule.startswith(rule)


def test_a_breach_of_the_schema_says_where(contract: Any) -> None:
    (breach,) = contract(PRODUCT).breaches('{"name": "Tea", "price": 3, "parts": [{"id": 1}, {"id": "2"}]}')
    assert "at $.parts[1].id: '2' is not of type 'integer', required type: \"integer\"" in str(breach)
    (breach,) = contract(PRODUCT).breaches("Here you are: {}")
    assert str(breach).endswith("required JSON and nothing else")


@pytest.mark.parametrize(
    ("draft", "answer", "fits"),
    [
        ("http://json-schema.org/draft-04/schema#", 3, False),  # draft 4: exclusiveMinimum is a switch
        ("http://json-schema.org/draft-07/schema#", 3, None),
    ],
)
def test_the_draft_that_the_schema_names_is_used(contract: Any, draft: str, answer: Any, fits: bool | None) -> None:
    text = f"schema: {{$schema: '{draft}', minimum: 3, exclusiveMinimum: true}}"
    if fits is None:
        assert "schema.exclusiveMinimum: not a JSON Schema" in issues_of(contract, text)[0]
    else:
        assert (contract(text).breaches(json.dumps(answer)) == []) == fits


def test_a_schema_in_a_file_of_its_own(contract: Any, tmp_path: Path) -> None:
    file = tmp_path / "answer.schema.json"
    file.write_text('{"type": "array", "maxItems": 1}')
    first = contract("schema: answer.schema.json")
    assert first.breaches("[1]") == []
    assert [b.rule for b in first.breaches("[1, 2]")] == ["schema/maxItems"]
    file.write_text('{"type": "array", "maxItems": 2}')
    assert contract("schema: answer.schema.json").sha256 != first.sha256


# --- what is no contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "given nothing, required keys"),
        ("- a", "given list, required keys"),
        ("schema:", "given nothing to check, required one of schema, rules, guideline"),
        ("rule: {max_words: 3}", "rule: unknown key; did you mean rules?"),
        ("max_words: 3", "max_words: unknown key; did you mean rules.max_words?"),
        ("rules: {max_length: 3}", "rules.max_length: unknown key; did you mean max_characters?"),
        ("rules: {forbiden: x}", "rules.forbiden: unknown key; did you mean forbidden?"),
        ("rules: {tone: x}", "rules.tone: unknown key; required one of min_characters, min_words"),
        ("rules: 3", "rules: given int, required a section"),
        ("rules: {max_words: -1}", "rules.max_words: given -1, required a whole number of at least 0"),
        ("rules: {max_words: true}", "rules.max_words: given true, required a whole number"),
        ("rules: {max_words: 1.5}", "rules.max_words: given 1.5, required a whole number"),
        ("rules: {max_words: 3, min_words: 4}", "rules.min_words: given 4, required at most the 3 of max_words"),
        ("rules: {json_only: yes}", 'rules.json_only: given "yes", required true or false'),
        ("schema: {}\nrules: {json_only: false}", "rules.json_only: given false beside a schema"),
        ("rules: {language: english}", 'rules.language: given "english", required the ISO 639 code'),
        ("rules: {required: '(a'}", 'rules.required: given "(a", required a regular expression (missing )'),
        ("rules: {forbidden: [a, '*']}", 'rules.forbidden[1]: given "*", required a regular expression (nothing'),
        ("rules: {forbidden: []}", "rules.forbidden: given an empty list"),
        ("rules: {forbidden: [a, '']}", 'rules.forbidden[1]: given "", required text'),
        ("rules: {one_of: [1, 2]}", "rules.one_of[0]: given 1, required text; put it in quotes"),
        ('rules: {required: "\\d"}', "(put patterns in single quotes)"),
        ("rules: {required: a, required: b}", "the key required twice"),
        ("schema: 3", "schema: given 3, required a JSON Schema or the name of a file with one"),
        ("schema: s.json", "No such file or directory"),
        ("guideline: g.md", "No such file or directory"),
        ("schema: {type: objekt}", "schema.type: not a JSON Schema: 'objekt' is not valid"),
        (
            "schema: {patternProperties: {'^(a+)+$': {}}}",
            "schema: given patternProperties, whose",
        ),
        ("schema: {pattern: '(a'}", "schema.pattern: not a JSON Schema: '(a' is not a 'regex'"),
        ("schema: {$schema: 'my draft'}", 'schema.$schema: given "my draft", required a draft of JSON Schema'),
        ("schema: {$ref: '#/$defs/x'}", 'schema: given the $ref "#/$defs/x", which is not in the file'),
        ("schema: {items: {$ref: 'http://127.0.0.1/s'}}", "which is not in the file; put it under $defs"),
        ("schema: {$ref: '#'}", "schema: given a $ref that leads to itself"),
        ("schema: {items: {format: telephone}}", "schema: given the format telephone, required one of date,"),
    ],
)
def test_a_contract_that_would_not_be_checked_is_refused(contract: Any, text: str, said: str) -> None:
    assert said in issues_of(contract, text)[0]


def test_all_issues_at_once_with_the_file(contract: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        contract("rules: {max_words: x, languag: en}\nguideline: g\nschema: {type: 3}")
    assert len(caught.value.issues) == 4
    assert all(issue.startswith(f"{tmp_path / 'c.yaml'}: ") for issue in caught.value.issues)
    assert caught.value.exit_code == 2


def test_a_property_that_is_called_format_is_no_format(contract: Any) -> None:
    text = "schema: {properties: {format: {type: string}}, const: {format: whatever, $ref: nowhere}}"
    assert [b.rule for b in contract(text).breaches('{"format": "pdf"}')] == ["schema/const"]


def test_no_network_is_asked(contract: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert "not in the file" in issues_of(contract, "schema: {$ref: 'https://example.com/s.json'}")[0]


# --- hashes, time, conversations ----------------------------------------------------------------------------


def test_hashes_are_those_of_the_files(contract: Any, tmp_path: Path) -> None:
    text = "guideline: tone.md\nrules: {max_words: 3}"
    (tmp_path / "tone.md").write_bytes(b"Be kind.\n")
    first = contract(text)
    assert first.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert first.guideline_sha256 == hashlib.sha256(b"Be kind.\n").hexdigest()
    (tmp_path / "tone.md").write_bytes(b"Be brief.\n")
    assert contract(text).sha256 == first.sha256
    assert contract(text).guideline_sha256 != first.guideline_sha256
    assert contract("rules: {max_words: 3}").guideline_sha256 is None


@pytest.mark.parametrize("text", ["rules: {forbidden: '^(a|aa)+$'}", "schema: {type: string, pattern: '^(a|aa)+$'}"])
def test_a_pattern_that_would_run_for_ages_is_stopped_and_named(
    contract: Any, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(answer_rules, "PATTERN_SECONDS", 0.1)
    loaded = contract(text)
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"c\.yaml: .*given \^\(a\|aa\)\+\$, which takes more than 0\.1 s"):
        loaded.breaches(json.dumps("a" * 60 + "b") if "schema" in text else "a" * 60 + "b")
    assert time.process_time() - start < 2


def test_answers_are_the_trained_turns_that_say_something() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = Conversation(
        "a",
        (
            Message("system", "bad"),
            Message("user", "bad"),
            Message("assistant", "bad", train=False),
            Message("user", "bad"),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", "bad"),
            Message("assistant", "bad", reasoning="bad"),
            Message("user", "bad"),
            Message("assistant", "bad", weight=0.0),
            Message("user", "bad"),
            Message("assistant", "fine", train=True, reasoning="bad"),
            Message("user", "bad"),
            Message("assistant", ""),
        ),
    )

    def found(train_on: TrainOn) -> list[tuple[int, str]]:
        return [(answer.turn, answer.text) for answer in trained_answers(row, train_on)]

    assert found(TrainOn.all) == [(2, "bad"), (4, "fine"), (5, "")]
    assert found(TrainOn.last) == [(5, "")]
    assert found(TrainOn.flagged) == [(4, "fine")]


def test_a_text_is_checked_without_a_model_library() -> None:
    """`evaluate` and a service may check what a model says where neither torch nor transformers is."""
    code = "import sys, sftdist.data.contract; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    path = tmp_path_factory.mktemp("contract") / "c.yaml"
    rules = "{language: de, json_only: true, required: x, forbidden: a, starts_with: b, ends_with: c, one_of: d}"
    path.write_text(f"schema: {{type: object}}\nrules: {rules}")
    return Contract.load(path)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
@example(text="\ud800")
@example(text='"\\ud800"')
@example(text="9" * 5000)
def test_no_answer_breaks_the_check_itself(everything: Contract, text: str) -> None:
    for breach in everything.breaches(text):
        str(breach).encode("utf-8")


# --- real answers -------------------------------------------------------------------------------------------


def test_the_format_of_gsm8k(contract: Any, shared_data: Path) -> None:
    """Every answer of this source ends with its number; a shortened one does not."""
    loaded = contract("rules: {language: en, required: '\\n#### -?[\\d.,]+$', forbidden: '```'}")
    lines = (shared_data / "domain_gsm8k.messages.jsonl").read_text(encoding="utf-8").split("\n")[:-1:10]
    answers = [json.loads(line)["messages"][-1]["content"] for line in lines]
    assert [str(b) for answer in answers for b in loaded.breaches(answer)] == []
    assert all(loaded.breaches(answer[: len(answer) // 2]) for answer in answers)
