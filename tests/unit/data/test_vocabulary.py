"""The trained tokenizer: deterministic, of the size asked for, and able to spell everything."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdist.data.vocabulary import SPECIAL_TOKENS, train_tokenizer

TEXTS = [f"The support desk answers ticket {i}: naïve café, {i * 37} items\n\tin stock." for i in range(300)]
TOKENIZER = train_tokenizer(TEXTS, 300)
PRINT_HASH = """
import hashlib
from sftdist.data.vocabulary import train_tokenizer
texts = [f"The support desk answers ticket {i}: naïve café, {i * 37} items\\n\\tin stock." for i in range(300)]
print(hashlib.sha256(train_tokenizer(texts, 300).backend_tokenizer.to_str().encode()).hexdigest())
"""


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_size_and_special_tokens() -> None:
    assert len(TOKENIZER) == 300
    assert [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert TOKENIZER.eos_token == "<|endoftext|>"
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    assert TOKENIZER.encode("<|im_end|>") == [2]
    assert len(TOKENIZER.encode("12345")) == 5


def test_other_processes_train_the_same_tokenizer() -> None:
    def trained() -> str:
        return subprocess.run([sys.executable, "-c", PRINT_HASH], capture_output=True, text=True, check=True).stdout

    assert trained() == trained()


def test_a_vocabulary_that_cannot_hold_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="given 100, required at least 260"):
        train_tokenizer(TEXTS, 100)
