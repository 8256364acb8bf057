"""held_out.jsonl: what an evaluation asks is what was held out, whole, once, and the same however it was made."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sftdist.core.errors import DataError
from sftdist.core.settings import RowShape
from sftdist.data.held_out import HELD_OUT, from_json, message_from_json, message_to_json, read_held_out, to_json
from sftdist.data.keys import content_key, prompt_key
from sftdist.data.message import Message
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.schema import Conversation, Reject, parse
from sftdist.data.shards import SHARD_CHUNKS
from sftdist.data.sources import CHUNK_ROWS, Source
from sftdist.data.store import SPLITS, TRAIN, TokenStore
from sftdist.data.vocabulary import train_tokenizer
from tests.unit.data.stock import CALL, TOOL

fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([f"question {i} answer {i} system user assistant" for i in range(200)], 320)


def row(number: int, **fields: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
    return {"id": f"r{number}", "messages": said, **fields}


def request(
    folder: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast, stores: str = "stores", **changes: Any
) -> PrepareRequest:
    file = folder / "x.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    more = {"validation_fraction": 0.2, "holdout_fraction": 0.2, **changes}
    entry = SourceRequest(Source("train", str(file)))
    return PrepareRequest((entry,), folder / stores, tokenizer=tokenizer, chat_template="chatml", **more)


def lines(store: TokenStore) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store.path / HELD_OUT).read_text(encoding="utf-8").splitlines()]


# --- a conversation and back ---------------------------------------------------------------------------------

EVERYTHING = {
    "id": "zwölf\n日本",
    "tags": ["a", "b"],
    "label_origin": "synthetic:m",
    "tools": [TOOL],
    "checks": {"schema": {"type": "object", "required": ["city"]}, "forbidden": ["x"], "limit": 1.5},
    "messages": [
        {"role": "system", "content": " Be brief.\u2028"},
        {"role": "user", "content": "Où est 東京? \U0001f5fc", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "look it up", "weight": 0.25},
        {"role": "tool", "content": "", "name": "get_weather", "tool_call_id": "abcdefgh1"},
        {"role": "assistant", "content": "Dry.", "train": False},
        {"role": "assistant", "content": "Dry!", "train": True, "weight": 0.0},
    ],
}


def parsed(row: dict[str, Any]) -> Conversation:
    found = parse(row, RowShape.auto, file="", line=0, id=None)
    assert isinstance(found, Conversation), found
    return found


def test_everything_that_a_conversation_can_say_comes_back() -> None:
    given_one = parsed(EVERYTHING)
    back = from_json(json.loads(json.dumps(to_json(given_one))))
    assert back == given_one
    assert (content_key(back), prompt_key(back)) == (content_key(given_one), prompt_key(given_one))
    assert parsed(to_json(given_one)) == given_one, "it is a row, too"


def test_fields_that_say_nothing_are_left_out() -> None:
    assert message_to_json(Message("user", "")) == {"role": "user", "content": ""}
    assert message_to_json(Message("assistant", "a", weight=0.0)) == {
        "role": "assistant",
        "content": "a",
        "weight": 0.0,
    }
    assert message_to_json(Message("assistant", "a", train=False))["train"] is False


@given(
    st.builds(
        Message,
        role=st.sampled_from(["system", "user", "assistant", "tool"]),
        content=st.text(),
        reasoning=st.none() | st.text(min_size=1),
        name=st.none() | st.text(min_size=1),
        tool_call_id=st.none() | st.text(min_size=1),
        train=st.none() | st.booleans(),
        weight=st.sampled_from([0.0, 1.0, 0.3, 1e6]),
    )
)
def test_any_message_comes_back(message: Message) -> None:
    assert message_from_json(json.loads(json.dumps(message_to_json(message)))) == message


# --- in a store ----------------------------------------------------------------------------------------------


def test_each_kept_row_that_is_held_out_is_there_once_and_no_other(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Not a duplicate, nor a refused row, nor one of the train split; the digests are those of the columns."""
    refused = {"id": "refused", "prompt": "question 7", "completion": "stop <|im_end|> here"}
    rows = [*(row(n) for n in range(60)), *(row(n, id=f"copy-{n}") for n in range(60)), refused, EVERYTHING]
    store = prepare(request(tmp_path, rows, tokenizer, max_refused=9, max_bad_rows=9)).stores["train"]
    held = [number for number, split in enumerate(store.split.tolist()) if split != TRAIN]
    found = lines(store)
    assert len(held) > 10
    assert [line["id"] for line in found] == store.row_ids(held)
    assert [SPLITS.index(line["split"]) for line in found] == store.split[held].tolist()
    for column, name in ((store.contents, "content"), (store.prompts, "prompt")):
        assert [line[name] for line in found] == [digest.tobytes().hex() for digest in column[held]]
    ids = {line["id"] for line in found}
    assert not ids & {"refused", *(f"copy-{n}" for n in range(60))}
    own = {one.conversation.id: one for one in read_held_out(store.path)}
    for number in range(60):
        if f"r{number}" in own:
            assert own[f"r{number}"].conversation == replace(parsed(row(number)), file="", line=0)


def test_a_conversation_stands_there_as_it_is_trained_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """After normalising, and whole where each turn is a row of its own."""
    talk = [{"role": "user", "content": "one\r\ntwo  "}, {"role": "assistant", "content": "e\u0301 "}]
    rows = [{"id": "a", "messages": [*talk, *talk]}]
    mask: dict[str, Any] = {"validation_fraction": 0.0, "holdout_fraction": 0.0}
    made = request(tmp_path, [row(n) for n in range(9)], tokenizer, **mask)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    mine = SourceRequest(Source("validation", str(tmp_path / "val.jsonl"), key="data.val"))
    mine = replace(mine, mask=replace(mine.mask, expand_turns=True))
    store = prepare(replace(made, validation=mine)).held_out["validation"]
    assert store.row_ids(range(len(store))) == ["a#0", "a#1"]
    (only,) = read_held_out(store.path)
    assert (only.split, only.conversation.id) == ("validation", "a")
    assert [message.content for message in only.conversation.messages] == ["one\ntwo", "é"] * 2


def test_a_store_without_held_out_rows_has_an_empty_list(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row(n) for n in range(9)]
    store = prepare(request(tmp_path, rows, tokenizer, validation_fraction=0.0, holdout_fraction=0.0)).stores["train"]
    assert (store.path / HELD_OUT).read_bytes() == b""


def prepare_and_die(request: PrepareRequest, shards: int) -> None:
    left = shards

    def tick(_: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(request, tick=tick)


def test_the_same_bytes_for_any_number_of_workers_and_after_a_kill(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    count = SHARD_CHUNKS * CHUNK_ROWS + CHUNK_ROWS  # two shards
    checks = {"schema": {"é": [1, 2.5, None]}}
    rows = [row(n, checks=checks if n % 3 else None, tags=[f"t{n % 5}"]) for n in range(count)]
    found = []
    for stores, workers, killed in (("one", 1, False), ("two", 2, True)):
        asked = request(tmp_path, rows, tokenizer, stores, workers=workers)
        if killed:
            process = fork.Process(target=prepare_and_die, args=(asked, 1))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert list(asked.store_dir.glob(".train-*.work/*.npz"))
        found.append((prepare(asked).stores["train"].path / HELD_OUT).read_bytes())
    assert found[0] == found[1]
    assert found[0].count(b"\n") > count // 4
    assert b"\xc3\xa9" in found[0]


# --- checks --------------------------------------------------------------------------------------------------


def test_checks_are_not_trained_on_and_make_no_other_conversation() -> None:
    plain, checked = parsed(row(1)), parsed(row(1, checks={"regex": "a"}))
    assert (content_key(plain), prompt_key(plain)) == (content_key(checked), prompt_key(checked))


def test_checks_may_be_a_json_text_and_fields_of_a_table_that_say_nothing_are_none() -> None:
    assert parsed(row(1, checks='{"regex": "a"}')).checks == {"regex": "a"}
    assert parsed(row(1, checks={"regex": "a", "schema": None})).checks == {"regex": "a"}
    assert parsed(row(1, checks=None)).checks == {}


DEEP: dict[str, Any] = {}
for _ in range(70):
    DEEP = {"more": DEEP}


@pytest.mark.parametrize(
    ("checks", "given_words", "reason"),
    [
        (["regex"], "regex", "checks are not an object"),
        (7, "7", "checks are not an object"),
        ("{broken", "{broken", "checks are not an object"),
        ('"text"', "text", "checks are not an object"),
        ({"limit": float("nan")}, "nan", "number is not finite"),
        ({"pattern": "\ud800"}, "", ""),
        ({"schema": DEEP}, "64 levels", "nested too deeply"),
    ],
)
def test_misshaped_checks_are_a_bad_row(checks: Any, given_words: str, reason: str) -> None:
    found = parse(row(1, checks=checks), RowShape.auto, file="x.jsonl", line=3, id=None)
    assert isinstance(found, Reject)
    assert found.field.startswith("checks")
    assert given_words in found.given
    assert reason in found.reason


def test_a_bad_row_by_its_checks_stops_prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*(row(n) for n in range(5)), row(5, checks=["regex"])]
    with pytest.raises(DataError, match="checks"):
        prepare(request(tmp_path, rows, tokenizer))


def test_all_rows_of_a_split_are_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Counted against the store's own figures."""
    store = prepare(request(tmp_path, [row(n) for n in range(200)], tokenizer)).stores["train"]
    counted = Counter(line["split"] for line in lines(store))
    assert {name: counted[name] for name in SPLITS[1:]} == {
        name: store.manifest["splits"][name]["rows"] for name in SPLITS[1:]
    }
    assert "train" not in counted
