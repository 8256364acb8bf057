"""The shipped base model: small, as its script makes it, able to copy, and new to the support desk."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sftdist.assets import desk
from sftdist.assets.make_base import (
    HELD_OUT,
    KNOWN,
    ROW,
    UNKNOWN,
    fill_rows,
    losses,
    lr_at,
    make_batch,
    make_model,
    make_tokenizer,
    measure,
    whole_words,
)
from sftdist.assets.words import digits, name

BASE = Path(str(files("sftdist.assets") / "base"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


def test_the_repository_carries_at_most_ten_megabytes() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 10e6


def test_a_tokenizer_is_made_the_same_every_time(tokenizer: PreTrainedTokenizerBase) -> None:
    made = make_tokenizer()
    assert made.backend_tokenizer.to_str() == make_tokenizer().backend_tokenizer.to_str()
    assert len(made) == len(tokenizer)
    assert made.chat_template == tokenizer.chat_template


def test_text_to_copy_has_the_same_tokens_everywhere(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = Random(0)
    for _ in range(200):
        what = rng.choice((name(rng), digits(rng, 1, 6), f"{name(rng)} {name(rng)}"))
        inside = tokenizer.tokenize(what)
        for around in ('"{}"', "a {} b", "{},", ": {}\n", "({})", '{{"x": "{}"}}'):
            tokens = tokenizer.tokenize(around.format(what))
            assert any(tokens[start : start + len(inside)] == inside for start in range(len(tokens))), around


def test_words_of_the_soup_are_one_token_in_a_sentence(tokenizer: PreTrainedTokenizerBase) -> None:
    words = whole_words(tokenizer)
    assert {"refund", "lamp", "Policy"} < set(words)
    for word in words:
        alone = word if word[0].isupper() else f" {word}"
        assert len(tokenizer.tokenize(alone)) == 1


def test_any_text_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("  two  spaces\n\n\tand tabs ", "Grüße, 東京 🎉 e\u0301", "x" * 50, "<|im_start|>user\n", "A1b2C3"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_rows_hold_whole_documents_and_weigh_what_can_be_known() -> None:
    encoded = [
        (np.full(length, length), np.arange(length) % 2 == 0) for length in (200, 100, 50, ROW + 1, 150, 90, 200)
    ]
    ids, weights = fill_rows(encoded, rows=2, pad=0)
    assert [sorted(set(row.tolist())) for row in ids] == [[0, 50, 200], [0, 100, 150]]
    for length in (200, 100, 50, 150):
        assert (ids == length).sum() == length
        assert set(weights[ids == length].tolist()) == {np.float32(KNOWN).item(), np.float32(UNKNOWN).item()}
    assert (weights[ids == 0] == 0).all()


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [lr_at(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == 0.01
    assert set(rates[100:700]) == {1.0}
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert rates[-1] == 0.05


def test_a_step_of_the_script_learns(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model(tokenizer, seed=0)
    ids, _ = make_batch(tokenizer, 0, 2)
    before = losses(model, ids)[0].mean()
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert losses(model, ids)[0].mean() < before


def test_the_base_knows_its_own_held_out_text_and_not_the_desk(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    _, right = measure(model, make_batch(tokenizer, HELD_OUT, 32))
    assert right > 0.85
    row = desk.rows("format")[0]
    text = tokenizer("\n".join(desk.texts(row)), return_tensors="pt")["input_ids"]
    answer = len(tokenizer(desk.texts(row)[-1])["input_ids"])
    _, hit = losses(model, text)
    assert hit[0, -answer:].float().mean() < 0.6
