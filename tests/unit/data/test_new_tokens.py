"""`model.add_tokens`: one id each, kept when decoded, and nothing that the tokenizer had is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from sftdist.core.errors import ConfigError
from sftdist.data.mask import Encoded, MaskOptions
from sftdist.data.new_tokens import ids_of, require_seen, with_tokens
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.sources import Source
from sftdist.data.store import HOLDOUT
from sftdist.data.template import ChatTemplate
from tests.e2e.workshop import SPECIALS, write_rows
from tests.tokenizers import byte_tokenizer
from tests.unit.data.stock import assistant, talk, user

NEW = ("<city>", "</city>")


def template() -> ChatTemplate:
    return ChatTemplate.of(byte_tokenizer(specials=SPECIALS), "chatml")


def test_each_token_is_one_id_after_the_old_ones_and_the_old_ones_stay() -> None:
    before = template()
    after = with_tokens(before, NEW)
    first = len(before.tokenizer)
    assert ids_of(after.tokenizer, NEW) == {"<city>": first, "</city>": first + 1}
    assert after.tokenizer.get_vocab().items() >= before.tokenizer.get_vocab().items()
    assert len(before.tokenizer) == first, "the tokenizer that was given is another object"


def test_a_conversation_that_holds_them_is_masked_and_decoded_as_before() -> None:
    row = talk("one", user("Where is <city>Bonn</city>?"), assistant("On the Rhine: <city>Bonn</city>."))
    after = with_tokens(template(), NEW)
    (encoded,) = after.encode([row], MaskOptions())
    assert isinstance(encoded, Encoded)
    ids, trained = encoded.ids.tolist(), encoded.ids[encoded.weights > 0].tolist()
    begin, end = ids_of(after.tokenizer, NEW).values()
    assert (ids.count(begin), ids.count(end), trained.count(begin), trained.count(end)) == (2, 2, 1, 1)
    kept = after.tokenizer.decode(trained, skip_special_tokens=True)
    assert kept.startswith("On the Rhine: <city>Bonn</city>."), "a special token would be lost from the answer"


def test_a_known_token_keeps_its_id_and_is_not_new() -> None:
    once = with_tokens(template(), NEW)
    twice = with_tokens(once, ("</city>", "<river>"))
    assert ids_of(twice.tokenizer, NEW) == ids_of(once.tokenizer, NEW)
    assert twice.tokenizer.convert_tokens_to_ids("<river>") == len(once.tokenizer)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("",), "given ''"),
        ((" \n",), "something to see"),
        (("<a>", "<b>", "<a>"), "given '<a>' twice"),
        (("x<|im_end|>",), "would hide '<|im_end|>'"),
        (("answer<",), "would hide '<"),
        (("<|im",), "would hide '<|im_"),
    ],
)
def test_tokens_that_would_lose_something_are_refused(tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.add_tokens") as refused:
        with_tokens(template(), tokens)
    assert message in str(refused.value)


def test_a_piece_of_a_special_token_that_cannot_hide_it_is_taken() -> None:
    after = with_tokens(template(), ("im_start",))
    assert after.ids("<|im_start|>") == template().ids("<|im_start|>")


def _with_a_gap() -> PreTrainedTokenizerBase:
    """Its added tokens' ids lie in the middle of the ids of its words."""
    tokenizer = byte_tokenizer(specials=SPECIALS)
    state = tokenizer.backend_tokenizer.to_str()
    last = max(tokenizer.get_vocab().values())
    moved = state.replace(f'"id":{last},', f'"id":{last + 7},')
    assert moved != state
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(moved)
    return tokenizer


def test_ids_behind_a_gap_belong_to_one_token_only() -> None:
    given = ChatTemplate.of(_with_a_gap(), "chatml")
    after = with_tokens(given, NEW)
    numbers = list(after.tokenizer.get_vocab().values())
    assert len(set(numbers)) == len(numbers)


def test_prepare_makes_another_store_and_unseen_tokens_are_named(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "my.jsonl", 60)

    def request(*tokens: str) -> PrepareRequest:
        source = SourceRequest(Source("mine", (str(rows),), key="data.train"))
        given = byte_tokenizer(specials=SPECIALS)
        return PrepareRequest(
            (source,), tmp_path / "stores", tokenizer=given, chat_template="chatml", add_tokens=tokens
        )

    plain, added = (prepare(request(*tokens)) for tokens in ((), ("colour", "<river>")))
    assert plain.stores["mine"].path != added.stores["mine"].path
    tokenizer = added.template.tokenizer
    assert int(added.stores["mine"].manifest["largest_id"]) == tokenizer.convert_tokens_to_ids("colour")
    assert len(added.stores["mine"].ids) < len(plain.stores["mine"].ids)
    stores = list(added.stores.values())
    require_seen(stores, ids_of(tokenizer, ("colour",)))
    with pytest.raises(ConfigError, match=r"'<river>' in no train row"):
        require_seen(stores, ids_of(tokenizer, ("colour", "<river>")))


def test_a_token_of_held_out_rows_alone_is_unseen(tmp_path: Path) -> None:
    rows, held = write_rows(tmp_path / "my.jsonl", 60), tmp_path / "held.jsonl"
    held.write_text('{"messages":[{"role":"user","content":"<river>?"},{"role":"assistant","content":"Rhine"}]}\n')
    request = PrepareRequest(
        (SourceRequest(Source("mine", (str(rows), str(held)), key="data.train")),),
        tmp_path / "stores",
        tokenizer=byte_tokenizer(specials=SPECIALS),
        chat_template="chatml",
        add_tokens=("<river>",),
    )
    found = prepare(request)
    store = found.stores["mine"]
    tokens = ids_of(found.template.tokenizer, ("<river>",))
    require_seen([store], tokens)
    place = int((store.ids == tokens["<river>"]).argmax())
    row = int(store.offsets.searchsorted(place, side="right")) - 1
    split = store.split.copy()
    split[row] = HOLDOUT
    store = replace(store, split=split)
    with pytest.raises(ConfigError, match="in no train row"):
        require_seen([store], tokens)
