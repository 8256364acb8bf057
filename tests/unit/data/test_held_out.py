"""The conversations that a store holds out are in it as text: all of them, as they were tokenised, and no other."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdist.core.storage import read_jsonl
from sftdist.data.held_out import from_json, read_held_out, to_json
from sftdist.data.keys import content_key, prompt_key
from sftdist.data.mask import MaskOptions
from sftdist.data.message import Message
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.schema import Conversation
from sftdist.data.sources import Source
from sftdist.data.store import SPLITS, TRAIN, TokenStore
from tests.tokenizers import byte_tokenizer

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": ["ä", 1, None]}}}
FULL = Conversation(
    id="zwölf\n日本",
    messages=(
        Message("system", "s", train=False),
        Message("user", "q", name="Ann"),
        Message("assistant", "", reasoning="hm", tool_calls=(CALL,), weight=0.5),
        Message("tool", "{}", tool_call_id="1"),
        Message("assistant", "a", train=True),
    ),
    tools=({"type": "function", "function": {"name": "look"}},),
    tags=("x", "y"),
    label_origin="synthetic:m",
    checks={"schema": {"type": "object"}, "forbidden": ["\u2028"]},
)


def row(number: int, **fields: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}\r\n"}]
    return {"id": f"r{number}", "messages": said, "checks": {"regex": str(number)}, **fields}


def prepared(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> TokenStore:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    request = PrepareRequest(
        sources=(SourceRequest(Source("train", str(file))),),
        store_dir=folder / "stores",
        tokenizer=byte_tokenizer(specials=("<|im_start|>", "<|im_end|>")),
        chat_template="chatml",
        validation_fraction=0.3,
        holdout_fraction=0.3,
    )
    return prepare(replace(request, **changes)).stores["train"]


@pytest.mark.parametrize("conversation", [FULL, Conversation("a", (Message("user", "q"), Message("assistant", "a")))])
def test_a_conversation_comes_back_from_json_as_it_was(conversation: Conversation) -> None:
    back = from_json(json.loads(json.dumps(to_json(conversation))))
    assert back == conversation
    assert content_key(back) == content_key(conversation)
    assert prompt_key(back) == prompt_key(conversation)


def test_what_is_held_out_is_there_with_its_keys_and_nothing_else(tmp_path: Path) -> None:
    rows = [row(number) for number in range(60)]
    refused = {"id": "no", "prompt": "q", "completion": "stop <|im_end|> here"}
    store = prepared(tmp_path, [*rows, *rows[:20], refused], max_refused=1)
    held = list(read_held_out(store.path))
    places = np.flatnonzero(store.split != TRAIN)
    assert [one.conversation.id for one in held] == store.row_ids(places), "duplicates and refused rows have left"
    assert [one.split for one in held] == [SPLITS[split] for split in store.split[places]]
    assert Counter(one.split for one in held).keys() == {"validation", "holdout"}
    assert [one.content for one in held] == [store.contents[place].tobytes().hex() for place in places]
    assert [one.prompt for one in held] == [store.prompts[place].tobytes().hex() for place in places]
    for one in held:
        assert one.content == content_key(one.conversation).hex()
        number = one.conversation.id[1:]
        assert one.conversation.checks == {"regex": number}
        assert one.conversation.messages[1].content == f"answer {number}\n", "as it was tokenised, after normalising"


def test_one_line_for_a_conversation_whose_turns_are_rows(tmp_path: Path) -> None:
    talk = [("user", "q"), ("assistant", "a"), ("user", "more"), ("assistant", "b")]
    rows = [
        {"id": str(i), "messages": [{"role": role, "content": f"{text} {i}"} for role, text in talk]} for i in range(30)
    ]
    entry = SourceRequest(Source("train", str(tmp_path / "train.jsonl")), MaskOptions(expand_turns=True))
    store = prepared(tmp_path, rows, sources=(entry,))
    held = list(read_jsonl(store.path / "held_out.jsonl"))
    assert len(held) == len({one["id"] for one in held}) == (store.split != TRAIN).sum() / 2
    assert all(len(one["messages"]) == 4 for one in held)
