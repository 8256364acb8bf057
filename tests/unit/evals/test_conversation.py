"""Talking to a model: the parts of an answer add up to it, and it is the answer that an evaluation gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sftdist.core.errors import DataError
from sftdist.data.message import Message
from sftdist.evals.backends.hf import HfEngine
from sftdist.evals.conversation import Talk, Telling
from sftdist.evals.generate import ask
from sftdist.evals.prompts import Prompt
from sftdist.evals.voice import Voice
from tests.evaluated import BASE, CPU, prompts
from tests.spoken import Scripted
from tests.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def engine() -> HfEngine:
    voice = Voice.load(BASE)
    return HfEngine.load(BASE, voice.stop_ids, dtype="fp32", device=CPU, rows=voice.rows)


def test_an_answer_is_the_one_of_an_evaluation_and_its_parts_add_up(engine: HfEngine) -> None:
    asked = prompts(8)
    for prompt, wanted in zip(asked, ask(BASE, asked, max_new_tokens=16, batch_size=3), strict=True):
        parts: list[str] = []
        answer = Talk(Voice.load(BASE), engine, 16).answer(prompt.question, parts.append)
        assert answer == wanted
        assert "".join(parts) == answer.text
        assert len(parts) > 1 or len(answer.text.split()) == 1, "it comes in parts"


def test_the_next_message_is_asked_with_all_that_was_said(engine: HfEngine) -> None:
    talk = Talk(Voice.load(BASE), engine, 16, [Message("system", "town: Osvak")])
    first = talk.answer("Say again: river")
    second = talk.answer("What is the town?")
    said = (
        Message("system", "town: Osvak"),
        Message("user", "Say again: river"),
        Message("assistant", first.text),
        Message("user", "What is the town?"),
    )
    (wanted,) = ask(BASE, [Prompt("test/0", "test", said)], max_new_tokens=16)
    assert second == wanted
    assert talk.messages == [*said, Message("assistant", second.text)]


def test_a_conversation_that_does_not_fit_stays_as_it_was(engine: HfEngine) -> None:
    talk = Talk(replace(Voice.load(BASE), positions=60), engine, 4)
    talk.answer("Echo: one")
    before = list(talk.messages)
    with pytest.raises(DataError, match=r"given a conversation of \d+ tokens, but the model has 60 positions.*anew"):
        talk.answer("Echo: " + "red " * 60)
    assert talk.messages == before


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came() -> None:
    voice = Voice.load(BASE)
    ids = voice.template.tokenizer.encode("river lamp stone", add_special_tokens=False)
    talk = Talk(voice, Scripted([*ids, voice.stop_ids[0]], breaks_after=1), 8)
    with pytest.raises(KeyboardInterrupt):
        talk.answer("Say again: river")
    assert talk.messages[-1] == Message("assistant", voice.template.tokenizer.decode(ids[:1]))


def test_thoughts_are_told_but_not_remembered() -> None:
    voice = Voice.load(BASE)
    ids = voice.template.tokenizer.encode("<think>lamp</think>river", add_special_tokens=False)
    talk, parts = Talk(voice, Scripted([*ids, voice.stop_ids[0]]), 8), list[str]()
    assert talk.answer("Say again: river", parts.append).finished
    assert "".join(parts) == "<think>lamp</think>river", "without the stop id"
    assert talk.messages[-1].content == "river"


def test_letters_of_several_bytes_come_whole() -> None:
    tokenizer = byte_tokenizer()
    text = "h\u00e9 \u4f60\u597d \U0001f600!"
    parts: list[str] = []
    telling = Telling(tokenizer.decode, parts.append, by_words=False)
    for token in tokenizer.encode(text, add_special_tokens=False):
        telling.add(token)
    telling.end(text)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)
    assert "\U0001f600" in parts, "it is told when it is whole, not at the end"


def test_a_text_that_decoding_tidies_up_is_told_as_it_ends() -> None:
    """BERT's way, which Llama 3's tokenizer asks for, too: the blank before a full stop goes when that comes."""
    words = ["It", "is", "n't", "so", ".", "Is", "it", "?"]

    def tidy(ids: Sequence[int]) -> str:
        return " ".join(words[number] for number in ids).replace(" n't", "n't").replace(" .", ".").replace(" ?", "?")

    parts: list[str] = []
    telling = Telling(tidy, parts.append, by_words=True)
    for number in range(len(words)):
        telling.add(number)
    telling.end(tidy(range(len(words))))
    assert "".join(parts) == "It isn't so. Is it?"
    assert len(parts) > 2


def test_every_id_is_told_once(engine: HfEngine) -> None:
    voice = Voice.load(BASE)
    told: list[int] = []
    ids = voice.encode(Prompt("a", "a", (Message("user", "Say again: river"),)))
    new = engine.told(ids, 16, told.append)
    assert told == list(new) == list(engine.continued([ids], 16)[0])
    assert new[-1] in voice.stop_ids
