"""Greedy answers: they end at a stop id, are asked for with the training template, and do not depend on the batch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.storage import read_json, write_json
from sftdist.data.message import Message
from sftdist.evals.cache import AnswerCache
from sftdist.evals.decoding import Decoding
from sftdist.evals.engines import load_engine
from sftdist.evals.generate import answers, ask, batches_of
from sftdist.evals.prompts import Prompt
from sftdist.evals.voice import Voice
from sftdist.model.load import load_strictly
from tests.evaluated import CPU, alone

BASE = Path(str(files("sftdist.assets") / "base"))
TALKS = [
    [Message("user", "Echo: lamp 4711 Marela")],
    [Message("user", "Say again: river")],
    [Message("system", "town: Osvak\nnumber: 80213\nfriend: Tibo"), Message("user", "What is the number?")],
    [Message("user", "red green blue\nBackwards?")],
    [Message("user", "The key is Salo. The hat is 55.\n" * 6 + "Quote the hat.")],
]
PROMPTS = [Prompt(f"test/{number}", "test", tuple(talk)) for number, talk in enumerate(TALKS)]


def _by_hand(voice: Voice, model: torch.nn.Module, prompt: Prompt, limit: int) -> list[int]:
    """One prompt, no padding, no cache of keys and values, one token after another."""
    ids = list(voice.encode(prompt))
    start = len(ids)
    while len(ids) - start < limit and (len(ids) == start or ids[-1] not in voice.stop_ids):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_answers_are_those_of_one_prompt_alone() -> None:
    voice, model = Voice.load(BASE), load_strictly(BASE, torch.float32)
    by_hand = [_by_hand(voice, model, prompt, 12) for prompt in PROMPTS]
    for batch_size in (1, 2, 5):
        for ids, answer in zip(by_hand, ask(BASE, PROMPTS, max_new_tokens=12, batch_size=batch_size), strict=True):
            finished = ids[-1] in voice.stop_ids
            text = voice.template.tokenizer.decode(ids[:-1] if finished else ids)
            assert (answer.text, answer.tokens, answer.finished) == (text, len(ids) - finished, finished)


@pytest.mark.parametrize(("opening", "opened"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)])
def test_an_answer_knows_whether_its_prompt_began_the_thought(tmp_path: Path, opening: str, opened: bool) -> None:
    """By the prompt, also where the answer comes from the cache."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )
    voice = Voice.load(BASE, chat_template=template)
    ways = Decoding(max_new_tokens=2)
    cache = AnswerCache(tmp_path, "model", voice.sha256, ways)
    for _ in range(2):
        said = answers(
            lambda: load_engine(BASE, voice, ways, CPU),
            PROMPTS[:2],
            voice=voice,
            decoding=ways,
            world=alone(),
            cache=cache,
        )
        assert [answer.opened for answer in said] == [opened] * 2
    about_tags = Prompt("test/tags", "test", (Message("user", "What is <think>"),))
    assert voice.opens(voice.encode(about_tags)) == opened


def test_a_base_that_copies_ends_its_answer() -> None:
    answers = ask(BASE, PROMPTS, max_new_tokens=40)
    assert [answer.text for answer in answers][:3] == ["lamp 4711 Marela", "river", "80213"]
    assert all(answer.finished for answer in answers)


def test_a_cut_answer_says_so() -> None:
    (answer,) = ask(BASE, PROMPTS[:1], max_new_tokens=2)
    assert not answer.finished
    assert answer.tokens == 2


def _folder_with(tmp_path: Path, file: str, settings: Mapping[str, object]) -> Path:
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(BASE, folder)
    write_json(folder / file, {**read_json(folder / file), **settings})
    return folder


def test_sampling_settings_of_a_folder_change_nothing(tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    folder = _folder_with(tmp_path, "generation_config.json", settings)
    assert ask(folder, PROMPTS, max_new_tokens=8) == ask(BASE, PROMPTS, max_new_tokens=8)


def test_it_stops_at_the_ids_of_the_folder_alone(tmp_path: Path) -> None:
    (first,) = ask(BASE, PROMPTS[1:2], max_new_tokens=8)
    start = Voice.load(BASE).template.tokenizer.encode("river", add_special_tokens=False)[0]
    folder = _folder_with(tmp_path, "generation_config.json", {"eos_token_id": [start]})
    (answer,) = ask(folder, PROMPTS[1:2], max_new_tokens=8)
    assert first.text == "river"
    assert (answer.text, answer.finished) == ("", True)


def test_a_folder_without_a_stop_id_is_refused(tmp_path: Path) -> None:
    folder = _folder_with(tmp_path, "generation_config.json", {"eos_token_id": None})
    _folder_with(tmp_path, "config.json", {"eos_token_id": None})
    with pytest.raises(ConfigError, match=r"generation_config.json without eos_token_id.*add them"):
        Voice.load(folder)


def test_both_models_stop_at_the_ids_of_either(tmp_path: Path) -> None:
    folder = _folder_with(tmp_path, "generation_config.json", {"eos_token_id": [5]})
    own, other = Voice.load(BASE).stop_ids, Voice.load(folder).stop_ids
    assert other == (5,)
    assert Voice.load(folder, BASE).stop_ids == Voice.load(BASE, folder).stop_ids == tuple(sorted({*own, 5}))


def test_a_prompt_that_leaves_no_position_is_an_error_that_says_so() -> None:
    voice = Voice.load(BASE)
    short = Voice(voice.template, voice.stop_ids, positions=len(voice.encode(PROMPTS[4])))
    with pytest.raises(
        DataError, match=r"prompt test/4: given \d+ tokens, but the model has \d+ positions.*data.max_len"
    ):
        short.encode(PROMPTS[4])
    assert list(short.refused(PROMPTS)) == ["test/4"]


def test_a_prompt_near_the_end_of_the_positions_gets_the_room_that_is_left() -> None:
    voice = Voice.load(BASE)
    ids = [voice.encode(prompt) for prompt in PROMPTS]
    near = Voice(voice.template, voice.stop_ids, positions=len(ids[4]) + 3)
    batches = batches_of(ids, near, Decoding(max_new_tokens=12, batch_size=8))
    assert [(len(batch.prompts), batch.room) for batch in batches] == [(1, 3), (4, 12)]
    assert batches == batches_of(reversed(ids), near, Decoding(max_new_tokens=12, batch_size=8))
