"""Rows become conversations, or a reject with the exact place, what was given and what is required."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sftdist.core.settings import RowShape
from sftdist.data.message import TEXT_ONLY
from sftdist.data.schema import Conversation, Message, Reject, parse


def parsed(row: object, shape: RowShape = RowShape.auto) -> Conversation:
    found = parse(row, shape, file="f.jsonl", line=7, id=None)
    assert isinstance(found, Conversation), str(found)
    return found


def rejected(row: object, shape: RowShape = RowShape.auto) -> Reject:
    found = parse(row, shape, file="f.jsonl", line=7, id=None)
    assert isinstance(found, Reject), found
    return found


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


QUESTION, ANSWER = Message("user", "q"), Message("assistant", "a")
SHAPES: list[tuple[RowShape, dict[str, Any], tuple[Message, ...]]] = [
    (RowShape.messages, turns(("user", "q"), ("assistant", "a")), (QUESTION, ANSWER)),
    (RowShape.prompt_completion, {"prompt": "q", "completion": "a"}, (QUESTION, ANSWER)),
    (
        RowShape.prompt_completion,
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        (Message("system", "s"), QUESTION, ANSWER),
    ),
    (RowShape.alpaca, {"instruction": "q", "input": "", "output": "a"}, (QUESTION, ANSWER)),
    (RowShape.alpaca, {"instruction": "do", "input": "x", "output": "a"}, (Message("user", "do\n\nx"), ANSWER)),
    (
        RowShape.alpaca,
        {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        (Message("system", "s"), Message("user", "q0"), Message("assistant", "a0"), QUESTION, ANSWER),
    ),
    (
        RowShape.sharegpt,
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        (QUESTION, ANSWER),
    ),
    (
        RowShape.messages,
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        (QUESTION, ANSWER),
    ),
]


@pytest.mark.parametrize(("shape", "row", "messages"), SHAPES)
def test_every_shape_is_detected_and_can_be_named(
    shape: RowShape, row: dict[str, Any], messages: tuple[Message, ...]
) -> None:
    assert parsed(row).messages == messages
    assert parsed(row, shape).messages == messages


def test_provenance_and_id() -> None:
    row = turns(("user", "q"), ("assistant", "a"))
    assert (parsed(row).id, parsed(row).file, parsed(row).line) == ("f.jsonl:7", "f.jsonl", 7)
    assert parsed({**row, "id": 12, "tags": ["x"]}).id == "12"
    assert parsed({**row, "tags": ["x"]}).tags == ("x",)
    assert rejected({"id": "mine", "messages": [{"role": "user", "content": "q"}]}).id == "mine"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "f.jsonl:7: row: given [1, 2], required a JSON object"),
        ("text", 'f.jsonl:7: row: given "text", required a JSON object'),
        (
            {"text": "x"},
            "f.jsonl:7: row: given keys text, required messages | conversations | prompt and completion | "
            "instruction and output",
        ),
        (
            {**turns(("user", "q"), ("assistant", "a")), "prompt": "q", "completion": "a"},
            "f.jsonl:7: row: given keys of messages and prompt_completion, "
            "required one shape (name it: shape=messages)",
        ),
        ({"messages": []}, "f.jsonl:7: messages: given an empty list, required at least a user and an assistant turn"),
        ({"messages": "hi"}, 'f.jsonl:7: messages: given "hi", required a list of messages'),
        (
            turns(("user", "q")),
            "f.jsonl:7: messages: given 1 messages without an assistant turn, required at least one",
        ),
        (
            turns(("assistant", "a")),
            "f.jsonl:7: messages[0].role: given assistant first, required system or developer or user there",
        ),
        (
            turns(("user", "q"), ("assistant", "a"), ("developer", "b")),
            "f.jsonl:7: messages[2].role: given developer after assistant, required user or tool or assistant there",
        ),
        (
            turns(("user", "q"), ("system", "s"), ("assistant", "b")),
            "f.jsonl:7: messages[1].role: given system after user, required assistant there",
        ),
        (
            turns(("moderator", "q"), ("assistant", "b")),
            'f.jsonl:7: messages[0].role: given "moderator", required system | developer | user | assistant | tool',
        ),
        (turns(("user", ""), ("assistant", "a")), "f.jsonl:7: messages[0].content: given empty text, required text"),
        (turns(("user", "q"), ("assistant", " \n")), 'f.jsonl:7: messages[1].content: given " \\n", required text'),
        (turns(("user", "q"), ("assistant", None)), "f.jsonl:7: messages[1].content: given nothing, required text"),
        (turns(("user", "q"), ("assistant", 5)), "f.jsonl:7: messages[1].content: given 5, required text"),
        (
            turns(
                ("user", [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": "x"}]), ("assistant", "a")
            ),
            f'f.jsonl:7: messages[0].content[1]: given a part of type "image_url", required {TEXT_ONLY}',
        ),
        (
            {**turns(("user", "<image>What is it?"), ("assistant", "A cat.")), "images": ["cat.png"]},
            f'f.jsonl:7: images: given ["cat.png"], required {TEXT_ONLY}',
        ),
        (
            {"prompt": "q", "completion": "a", "audio": "q.wav"},
            f'f.jsonl:7: audio: given "q.wav", required {TEXT_ONLY}',
        ),
        (
            turns(("user", "q"), ("assistant", "\ud800")),
            "f.jsonl:7: messages[1].content: given half of a surrogate pair at character 0, required Unicode text",
        ),
        ({"prompt": "q", "completion": ""}, "f.jsonl:7: completion: given empty text, required text"),
        ({"instruction": "q", "output": None}, "f.jsonl:7: output: given nothing, required text"),
        (
            {"instruction": "q", "output": "a", "history": 5},
            "f.jsonl:7: history: given 5, required a list of [instruction, output]",
        ),
        (
            turns(("\ud800", "q"), ("assistant", "a")),
            'f.jsonl:7: messages[0].role: given "\\ud800", required system | developer | user | assistant | tool',
        ),
        (
            {**turns(("user", "q"), ("assistant", "a")), "id": [1]},
            "f.jsonl:7: id: given [1], required text or a whole number",
        ),
    ],
)
def test_what_is_wrong_is_said_exactly(row: object, message: str) -> None:
    assert str(rejected(row)) == message


def test_text_parts_are_joined() -> None:
    row = turns(("user", [{"type": "text", "text": "q"}, "r"]), ("assistant", [{"type": "text", "text": "a"}]))
    assert [m.content for m in parsed(row).messages] == ["qr", "a"]


def with_assistant(**fields: Any) -> dict[str, Any]:
    row = turns(("user", "q"))
    row["messages"].append({"role": "assistant", "content": "a", **fields})
    return row


def deep(levels: int) -> dict[str, Any]:
    return {"x": deep(levels - 1)} if levels else {}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"name": "f", "arguments": {"x": 1}},
    ],
)
def test_tool_calls_are_normalised_once(call: dict[str, Any]) -> None:
    message = parsed(with_assistant(content=None, tool_calls=[call])).messages[1]
    assert message.tool_calls == (CALL,)
    assert message.content == ""


def test_a_tool_conversation() -> None:
    row = turns(("user", "q"), ("assistant", None), ("tool", ""), ("tool", "r"), ("assistant", "a"))
    row["messages"][1]["tool_calls"] = [{**CALL, "id": "c1"}]
    row["messages"][2] |= {"tool_call_id": "c1", "name": "f"}
    row["tools"] = json.dumps([{"type": "function", "function": {"name": "f"}}])
    found = parsed(row)
    assert found.messages[1].tool_calls[0]["id"] == "c1"
    assert (found.messages[2].tool_call_id, found.messages[2].name) == ("c1", "f")
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tool_calls": [{"name": "f", "arguments": "{x"}]},
            'messages[1].tool_calls[0].arguments: given "{x" (Expecting property name enclosed in double quotes), '
            "required a JSON object",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            'messages[1].tool_calls[0].arguments: given "[1]", required a JSON object',
        ),
        ({"tool_calls": [{"arguments": {}}]}, "messages[1].tool_calls[0].name: given nothing, required text"),
        ({"tool_calls": "f()"}, 'messages[1].tool_calls: given "f()", required a list of calls'),
        (
            {"function_call": {"name": "f"}},
            'messages[1].function_call: given {"name": "f"}, required text, reasoning and tool_calls only',
        ),
        ({"image": "cat.png"}, f'messages[1].image: given "cat.png", required {TEXT_ONLY}'),
        ({"weight": -1}, "messages[1].weight: given -1, required a number of at least 0"),
        ({"weight": float("nan")}, "messages[1].weight: given NaN, required a number of at least 0"),
        ({"weight": True}, "messages[1].weight: given true, required a number of at least 0"),
        ({"weight": 10**400}, f"messages[1].weight: given {'1' + '0' * 56}..., required a number of at most 1,000,000"),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"x": ' + "[" * 100_000}]},
            "messages[1].tool_calls[0].arguments: given JSON nested too deeply, required what a template can render",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"x": ' + "9" * 5000 + "}"}]},
            "messages[1].tool_calls[0].arguments: given a number of 5000 digits, required at most 1000",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]},
            "messages[1].tool_calls[0].arguments.x: given the key twice in one object, required each key once",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {"x": b"raw"}}]},
            "messages[1].tool_calls[0].arguments.x: given a bytes, required what JSON can hold",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {1: "x"}}]},
            "messages[1].tool_calls[0].arguments: given the key 1, required keys that are text",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": deep(70)}]},
            f"messages[1].tool_calls[0].arguments{'.x' * 65}: given more than 64 levels, required fewer",
        ),
        ({"train": 1}, "messages[1].train: given 1, required true or false"),
        (
            {"reasoning_content": "x", "thinking": "y"},
            "messages[1].reasoning_content: given another text than in thinking, required one reasoning text",
        ),
    ],
)
def test_fields_of_a_message_that_are_wrong(fields: dict[str, Any], message: str) -> None:
    assert str(rejected(with_assistant(**fields))) == f"f.jsonl:7: {message}"


def test_training_fields() -> None:
    message = parsed(with_assistant(train=False, weight=0.5, reasoning_content="r")).messages[1]
    assert (message.train, message.weight, message.reasoning) == (False, 0.5, "r")
    assert parsed(with_assistant(thinking="t")).messages[1].reasoning == "t"
    row = turns(("user", "q"), ("assistant", "a"))
    row["messages"][0]["train"] = True
    assert rejected(row).reason == "only assistant turns can be trained"


def test_a_system_text_beside_the_turns() -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
    assert parsed(row).messages[0] == Message("system", "s")
    assert parsed({**row, "system": ""}).messages[0] == QUESTION
    twice = {**turns(("system", "other"), ("user", "q"), ("assistant", "a")), "system": "s"}
    assert rejected(twice).reason == "two system prompts"


@pytest.mark.parametrize("nothing", [[], None, ""])
def test_a_column_of_pictures_that_is_empty_in_this_row_is_no_picture(nothing: object) -> None:
    row = {**turns(("user", "q"), ("assistant", "a")), "images": nothing}
    assert isinstance(parse(row, RowShape.auto, file="f.jsonl", line=7, id=None), Conversation)
