"""The fast path of byte-level tokenizers gives what the Rust tokenizer gives, or is not taken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from sftdist.data import words as module
from sftdist.data.words import PATTERNS, Words

TEXTS = [f"It's the {i}th answer, isn't it?\n\n\tYES: it'll cost ${i * 37}...  (a_b = {i})\r\n" for i in range(300)]
ADDED = ["<|im_start|>", "<|im_end|>", "<|im_end|>x", "<s>"]
GPT2 = next(iter(PATTERNS))


def trained(pattern: str | None = GPT2, *, split: bool = True, normalizer: Any = None, **added: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    cut = pre_tokenizers.Split(Regex(pattern or ""), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level]) if split else byte_level
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, **{"normalized": False, **added}) for text in ADDED])
    return tokenizer


def words_of(tokenizer: Tokenizer) -> Words | None:
    return Words.of(tokenizer, json.loads(tokenizer.to_str()))


TOKENIZERS = {
    **{f"split{i}": trained(pattern) for i, pattern in enumerate(PATTERNS)},
    "bytelevel": trained(split=False),
    "nfc": trained(normalizer=normalizers.NFC()),
}
FAST = {name: words_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}
# Words, runs of one character and added tokens: what random characters hardly ever form.
PIECES = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=8),
    st.sampled_from(
        [*ADDED, "'s", "'LL", " it", "I'Ve", "\n\n", "  ", "\r\n", "\t", "...", "123456", "a_b", "<|im_", "|>"]
    ),
    st.builds(str.__mul__, st.characters(max_codepoint=127), st.integers(1, 5)),
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12))
def test_ids_and_places_are_those_of_the_tokenizer(name: str, pieces: list[str]) -> None:
    text, fast = "".join(pieces), FAST[name]
    assert fast is not None
    plain, found = TOKENIZERS[name].encode(text, add_special_tokens=False), fast.encode(text)
    assert found.ids == plain.ids
    assert [found.token_to_chars(i) for i in range(len(found.ids))] == plain.offsets
    assert [found.char_to_token(c) for c in range(len(text) + 2)] == [
        plain.char_to_token(c) for c in range(len(text) + 2)
    ]


@pytest.mark.parametrize(
    "tokenizer",
    [
        trained(r"\w+|\W+"),  # an expression that is not known
        trained(normalizer=normalizers.Lowercase()),
        trained(lstrip=True),
        trained(rstrip=True),
        trained(single_word=True),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_other_tokenizers_go_the_plain_way(tokenizer: Tokenizer) -> None:
    assert words_of(tokenizer) is None


@pytest.mark.parametrize(
    "wrong",
    [
        PATTERNS[GPT2].replace("(?![^ \\t-\\r])", ""),  # white space before a word is not left to it
        PATTERNS[GPT2].replace("'ll|", ""),
        PATTERNS[GPT2].replace("[^ \\t-\\r", "[^ \\t-\\n"),
        PATTERNS[GPT2].replace("[0-9]+", "[0-9]"),
    ],
)
def test_a_wrong_expression_is_seen_before_it_is_used(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    assert wrong != PATTERNS[GPT2]
    monkeypatch.setitem(module.PATTERNS, GPT2, wrong)
    assert words_of(TOKENIZERS["split0"]) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WORDS", 50)
    fast = words_of(TOKENIZERS["split0"])
    assert fast is not None
    for text in TEXTS:
        assert fast.encode(text).ids == TOKENIZERS["split0"].encode(text, add_special_tokens=False).ids
        assert len(fast._known) <= 50
    fast.encode("a" * 10_000)
    assert max(map(len, fast._known)) <= module.MAX_WORD
