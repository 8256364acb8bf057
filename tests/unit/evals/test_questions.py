"""The prompts that data asks: which ones, how much of a conversation, and none that was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdist.core.errors import DataError
from sftdist.core.settings import Reasoning, TrainOn
from sftdist.data.manifest import rows_of
from sftdist.data.mask import MaskOptions
from sftdist.data.pipeline import Prepared, PrepareRequest, SourceRequest, prepare
from sftdist.data.sources import Source
from sftdist.data.store import LEAKED, VALIDATION, TokenStore
from sftdist.evals.prompts import Prompt
from sftdist.evals.questions import numbered, questions, refuse_trained
from tests.tokenizers import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"function": {"name": "look", "arguments": {"at": 3}}}


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, **(said if isinstance(said, dict) else {"content": said})} for role, said in pairs]


def talk(number: int, **fields: Any) -> dict[str, Any]:
    said = turns(("system", "s"), ("user", f"question {number}"), ("assistant", f"first {number}"))
    said += turns(("user", "and?"), ("assistant", f"second {number}"))
    return {"id": f"r{number}", "messages": said, "tags": ["t"], "checks": {"regex": "second"}, **fields}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def prepared(folder: Path, rows: list[dict[str, Any]], mask: MaskOptions | None = None, **changes: Any) -> Prepared:
    request = PrepareRequest(
        sources=(SourceRequest(Source("one", write(folder / "one.jsonl", rows)), mask or MaskOptions()),),
        store_dir=folder / "stores",
        tokenizer=byte_tokenizer(TEMPLATE),
        validation_fraction=0.5,
        holdout_fraction=0.2,
    )
    return prepare(replace(request, **changes))


def file_of_own(folder: Path, rows: list[dict[str, Any]], mask: MaskOptions | None = None) -> SourceRequest:
    return SourceRequest(Source("validation", write(folder / "val.jsonl", rows)), mask or MaskOptions())


def asked_alone(folder: Path, row: dict[str, Any], mask: MaskOptions | None = None) -> Prompt:
    """The only prompt of a validation file of one row."""
    found = prepared(folder, [talk(0)], validation=file_of_own(folder, [row], mask))
    (prompt,) = questions(found.held_out.values(), "validation", max_len=10_000, most=None)
    return prompt


# --- how much of a conversation ---------------------------------------------------------------------------------


def test_the_last_answer_is_asked_for_and_all_before_it_is_given(tmp_path: Path) -> None:
    prompt = asked_alone(tmp_path, talk(7))
    assert (prompt.id, prompt.source, prompt.turn, prompt.tags) == ("validation/r7", "validation", 1, ("t",))
    assert [message.content for message in prompt.messages] == ["s", "question 7", "first 7", "and?"]
    assert prompt.reference == "second 7"
    assert prompt.checks == {"regex": "second"}


def test_it_is_the_last_answer_that_is_trained(tmp_path: Path) -> None:
    row = talk(7)
    row["messages"][4]["train"] = False
    assert asked_alone(tmp_path, row).reference == "first 7"
    row["messages"][4].pop("train")
    row["messages"][2]["train"] = True
    assert asked_alone(tmp_path, row, MaskOptions(TrainOn.flagged)).reference == "first 7", "as the store was made"


@pytest.mark.parametrize(("mode", "given"), [("keep", "why"), ("last", None), ("drop", None)])
def test_a_prompt_has_as_much_reasoning_as_is_trained_on(tmp_path: Path, mode: str, given: str | None) -> None:
    row = talk(7)
    for place, thought in ((2, "why"), (4, "so")):
        row["messages"][place]["reasoning_content"] = thought
    prompt = asked_alone(tmp_path, row, MaskOptions(reasoning=Reasoning(mode)))
    assert prompt.messages[2].reasoning == given
    assert prompt.reference == "second 7", "what is compared is the answer"


def test_calls_of_tools_are_held_against_checks(tmp_path: Path) -> None:
    said = turns(("user", "q"), ("assistant", {"content": "", "tool_calls": [CALL]}))
    prompt = asked_alone(tmp_path, {"id": "c", "messages": said})
    assert prompt.reference is None
    assert prompt.checks == {"tool_calls": [{"name": "look", "arguments": {"at": 3}}]}
    own = {"id": "c", "messages": said, "checks": {"tool_calls": [{"name": "other", "arguments": {}}]}}
    assert asked_alone(tmp_path, own).checks == own["checks"], "what a row says itself stands"


# --- which ones ---------------------------------------------------------------------------------------------


def ids(stores: list[TokenStore], split: str = "validation", *, most: int | None = None, max_len: int = 999) -> list:
    return [prompt.id for prompt in questions(stores, split, max_len=max_len, most=most)]


def test_more_prompts_contain_the_fewer_and_do_not_hang_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [talk(number) for number in range(60)]
    stores = list(prepared(tmp_path, rows).stores.values())
    few, more, everything = (ids(stores, most=most) for most in (5, 20, None))
    assert (len(few), few, more) == (5, more[:5], everything[:20])
    assert set(everything) == {f"one/{name}" for name in stores[0].row_ids(np.flatnonzero(stores[0].split == 1))}
    assert few != sorted(everything, key=lambda id: int(id[5:]))[:5], "the first rows would not stand for all"
    assert not set(everything) & set(ids(stores, "holdout"))
    again = tmp_path / "again"
    again.mkdir()
    assert ids(list(prepared(again, rows[::-1]).stores.values()), most=20) == more


def test_what_is_too_long_to_train_on_is_not_asked(tmp_path: Path) -> None:
    rows = [talk(number) for number in range(40)]
    for number in range(0, 40, 2):
        rows[number]["messages"][4]["content"] = "long " * 200
    for expand in (False, True):
        stores = list(prepared(tmp_path, rows, MaskOptions(expand_turns=expand)).stores.values())
        asked = ids(stores, max_len=400)
        assert asked, expand
        assert all(int(id.removeprefix("one/r")) % 2 for id in asked), expand
        assert len(ids(stores, max_len=2000)) > len(asked)


def test_a_row_that_leaks_the_holdout_is_in_no_split(tmp_path: Path) -> None:
    """A validation row with a prompt of the user's own holdout."""
    holdout = SourceRequest(Source("holdout", write(tmp_path / "hold.jsonl", [talk(1, tags=[])])))
    validation = file_of_own(tmp_path, [talk(1), talk(2)])
    found = prepared(tmp_path, [talk(0)], validation=validation, holdout=holdout)
    store = found.held_out["validation"]
    assert store.split.tolist() == [LEAKED, VALIDATION], "what this test is about"
    assert ids([store]) == ["validation/r2"]


def test_rows_of_one_name_are_told_apart_and_one_content_is_asked_once(tmp_path: Path) -> None:
    rows = [talk(1, id="a"), talk(2, id="a"), talk(3, id="b"), talk(1, id="c")]
    found = prepared(tmp_path, [talk(0)], validation=file_of_own(tmp_path, rows), deduplicate=False)
    prompts = questions(found.held_out.values(), "validation", max_len=999, most=None)
    assert {prompt.id: prompt.reference for prompt in prompts} == {
        "validation/a": "second 1",
        "validation/a~2": "second 2",
        "validation/b": "second 3",
    }


def test_a_name_is_given_once() -> None:
    assert numbered(["a", "b", "a", "a~2", "a"]) == ["a", "b", "a~2", "a~2~2", "a~3"]


# --- none that was trained on ---------------------------------------------------------------------------------


def test_a_held_out_row_in_the_training_data_is_refused(tmp_path: Path) -> None:
    """The rows of another run's training: same conversation, or the same prompt with another answer."""
    sound = prepared(tmp_path, [talk(number) for number in range(30)])
    (store,) = sound.stores.values()
    refuse_trained([store], "validation", [rows_of(store)])
    (held,) = store.row_ids(np.flatnonzero(store.split == VALIDATION)[-1:])
    same = talk(int(held[1:]), id="x")
    prompt = {**same, "messages": [*same["messages"][:2], *turns(("assistant", "other"))]}
    for name, kind, row in (("same", "content", same), ("prompt", "prompt", prompt)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [row, *(talk(number) for number in range(100, 110))]
        (other,) = prepared(folder, rows, validation_fraction=0.0, holdout_fraction=0.0).stores.values()
        with pytest.raises(DataError, match=rf"one: given 1 held-out row whose {kind} .* in source one \({held}\)"):
            refuse_trained([store], "validation", [rows_of(store), rows_of(other)])
        refuse_trained([store], "holdout", [rows_of(other)])


def test_rows_that_leaked_were_not_trained_on(tmp_path: Path) -> None:
    rows = [talk(number) for number in range(20)]
    found = prepared(tmp_path, rows, validation=file_of_own(tmp_path, rows[:5]), holdout_fraction=0.0)
    (store,) = found.stores.values()
    assert (store.split == LEAKED).sum() == 5
    validation = list(found.held_out.values())
    refuse_trained(validation, "validation", [rows_of(store)])
    whole = replace(rows_of(store), split=np.where(store.split == LEAKED, 0, store.split))
    with pytest.raises(DataError, match="given 5 held-out rows whose content"):
        refuse_trained(validation, "validation", [whole])
