"""User turns read back from tokens: in every stock template, and from stores of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftdist.data.mask import MaskOptions
from sftdist.data.pipeline import Prepared, PrepareRequest, SourceRequest, prepare
from sftdist.data.render import Unproven
from sftdist.data.sources import Source
from sftdist.data.template import ChatTemplate
from sftdist.evals.user_turns import UserTurns, prompts_of
from tests.tokenizers import byte_tokenizer
from tests.unit.data.stock import MULTI, STOCK, SYSTEM, TOOLS, UNICODE, stock_text

WITH_SYSTEM = {"gemma3"}  # the system message is the beginning of the first user turn
WITH_TOOLS = {"llama3_1", "llama3_2"}  # so is the list of tools


OFTEN = ("qwen3", "llama3_1", "gemma3", "deepseekv3", "gptoss", "nemotron_3_nano", "llava_next")


@pytest.mark.parametrize(
    "stem", [stem if stem in OFTEN else pytest.param(stem, marks=pytest.mark.long) for stem in STOCK]
)
def test_stock_templates_mark_user_turns(stem: str) -> None:
    template = ChatTemplate.of(byte_tokenizer(stock_text(stem)))
    turns = UserTurns.of(template)
    assert turns is not None
    assert turns.with_system == (stem in WITH_SYSTEM)
    for conversation in (MULTI, UNICODE, SYSTEM, TOOLS):
        try:
            text = template.render(conversation.messages, tools=conversation.tools)
        except Unproven:
            continue
        said = [message.content for message in conversation.messages if message.role == "user"]
        if conversation is SYSTEM and stem in WITH_SYSTEM:
            said = ["Be brief.\n\nHello"]  # which `prompts_of` knows
        if conversation is TOOLS and stem in WITH_TOOLS:
            said = []
        assert turns.read(text) == said, conversation.id


def test_a_template_that_marks_nothing_is_not_guessed() -> None:
    bare = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    assert UserTurns.of(ChatTemplate.of(byte_tokenizer(), bare)) is None


def prepared(folder: Path, template: str, *, mask: MaskOptions | None = None, system: bool = False) -> Prepared:
    """Thirty conversations of two questions each, and ten of one."""
    first = [{"role": "system", "content": "Be brief."}] if system else []
    rows = []
    for i in range(40):
        talk = [*first, {"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
        if i < 30:
            talk += [{"role": "user", "content": f"and {i}?"}, {"role": "assistant", "content": f"again {i}"}]
        rows.append({"messages": talk})
    folder.mkdir(exist_ok=True)
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(
        PrepareRequest(
            sources=(SourceRequest(Source("one", path=str(folder / "one.jsonl")), mask or MaskOptions()),),
            store_dir=folder / "stores",
            tokenizer=byte_tokenizer(template),
            chat_template=template,
            validation_fraction=0.3,
            holdout_fraction=0.1,
            near=None,
        )
    )


def said(found: Prepared, most: int = 1000) -> list[str]:
    return [one.text for one in prompts_of(list(found.stores.values()), found.template, most)]


def test_train_and_validation_rows_are_read_and_the_holdout_is_not(tmp_path: Path) -> None:
    found = prepared(tmp_path, stock_text("qwen3"), mask=MaskOptions(expand_turns=True))
    texts = said(found)
    assert len(texts) == len(set(texts))  # a conversation whose turns are rows of their own counts once
    splits: dict[str, set[str]] = {row["split"]: set() for row in _held(found)}
    for row in _held(found):
        splits[row["split"]] |= {m["content"] for m in row["messages"] if m["role"] == "user"}
    assert splits["validation"] < set(texts)
    assert not splits["holdout"] & set(texts)
    assert len(texts) == 70 - len(splits["holdout"])


def test_fewer_rows_are_among_the_more(tmp_path: Path) -> None:
    found = prepared(tmp_path, stock_text("qwen3"), mask=MaskOptions(expand_turns=True))
    assert set(said(found, 5)) < set(said(found, 20))
    assert 5 <= len(said(found, 5)) <= 10


def test_where_the_system_message_is_in_the_turn_the_validation_rows_are_read(tmp_path: Path) -> None:
    with_system = prepared(tmp_path / "system", stock_text("gemma3"), system=True)
    texts = said(with_system)
    assert set(texts) == {
        m["content"]
        for row in _held(with_system)
        if row["split"] == "validation"
        for m in row["messages"]
        if m["role"] == "user"
    }
    without = prepared(tmp_path / "plain", stock_text("gemma3"))
    assert len(said(without)) > 2 * len(texts)
    assert not any("brief" in text for text in [*texts, *said(without)])


def _held(found: Prepared) -> list[dict]:
    (store,) = found.stores.values()
    return [json.loads(line) for line in (store.path / "held_out.jsonl").read_text().splitlines()]
