"""Greedy generation: ends at a stop id, asks with the training template, the same for every batch size."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from sftdist.core.errors import ConfigError
from sftdist.core.storage import read_json, write_json
from sftdist.data.schema import Message
from sftdist.evals.generate import Speaker

BASE = Path(str(files("sftdist.assets") / "base"))
PROMPTS = [
    [Message("user", "Echo: lamp 4711 Marela")],
    [Message("user", "Say again: river")],
    [Message("system", "town: Osvak\nnumber: 80213\nfriend: Tibo"), Message("user", "What is the number?")],
    [Message("user", "red green blue\nBackwards?")],
    [Message("user", "The key is Salo. The hat is 55.\n" * 6 + "Quote the hat.")],
]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker.load(BASE)


def _by_hand(speaker: Speaker, prompt: Sequence[Message], limit: int) -> list[int]:
    """One prompt, no padding, no cache, one token after another."""
    ids = speaker.template.encode_prompt(list(prompt))
    start = len(ids)
    while len(ids) - start < limit and (len(ids) == start or ids[-1] not in speaker.stop_ids):
        with torch.no_grad():
            ids.append(int(speaker.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_are_those_of_one_prompt_alone(speaker: Speaker, batch_size: int) -> None:
    answers = speaker.answer(PROMPTS, max_new_tokens=12, batch_size=batch_size)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = _by_hand(speaker, prompt, 12)
        finished = ids[-1] in speaker.stop_ids
        text = speaker.template.tokenizer.decode(ids[:-1] if finished else ids)
        assert (answer.text, answer.tokens, answer.finished) == (text, len(ids) - finished, finished)


def test_a_base_that_copies_ends_its_answer(speaker: Speaker) -> None:
    answers = speaker.answer(PROMPTS, max_new_tokens=40)
    assert [answer.text for answer in answers][:3] == ["lamp 4711 Marela", "river", "80213"]
    assert all(answer.finished for answer in answers)


def test_a_cut_answer_says_so(speaker: Speaker) -> None:
    (answer,) = speaker.answer(PROMPTS[:1], max_new_tokens=2)
    assert not answer.finished
    assert answer.tokens == 2


def _folder_with(tmp_path: Path, settings: Mapping[str, object]) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder)
    file = folder / "generation_config.json"
    write_json(file, {**read_json(file), **settings})
    return folder


def test_sampling_settings_of_a_folder_change_nothing(speaker: Speaker, tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    other = Speaker.load(_folder_with(tmp_path, settings))
    assert other.answer(PROMPTS, max_new_tokens=8) == speaker.answer(PROMPTS, max_new_tokens=8)


def test_it_stops_at_the_ids_of_the_folder_alone(speaker: Speaker, tmp_path: Path) -> None:
    (first,) = speaker.answer(PROMPTS[1:2], max_new_tokens=8)
    start = speaker.template.tokenizer.encode("river", add_special_tokens=False)[0]
    stopped = Speaker.load(_folder_with(tmp_path, {"eos_token_id": [start]}))
    (answer,) = stopped.answer(PROMPTS[1:2], max_new_tokens=8)
    assert first.text == "river"
    assert (answer.text, answer.finished) == ("", True)


def test_a_folder_without_a_stop_id_is_refused(tmp_path: Path) -> None:
    folder = _folder_with(tmp_path, {"eos_token_id": None})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "eos_token_id": None})
    with pytest.raises(ConfigError, match=r"generation_config.json without eos_token_id.*add them"):
        Speaker.load(folder)
