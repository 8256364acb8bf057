"""A byte-level tokenizer for tests, which knows the control words of a chat template as special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CONTROL = re.compile(
    r"<\|[^<>|\s'+]+\|?>|<[^<>|\s/'+]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|</?s>|</?think>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>"
)
# Merges across bytes and white space, so that a wrong border between prompt and answer is seen in the ids.
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("|", ">"), ("<", "|"), ("Ã", "©")]
BOS, EOS, PAD = "<s>", "<|eos|>", "<|pad|>"


def control_words(template: str) -> list[str]:
    """The control words that stand in the text of a template, in order of appearance."""
    return list(dict.fromkeys(CONTROL.findall(template)))


def byte_tokenizer(
    template: str | None = None,
    *,
    specials: Sequence[str] | None = None,
    prepend_bos: bool = False,
    pad: str = PAD,
    rstrip: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """256 bytes, a few merges, and `specials` (default: the template's control words) as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    for left, right in MERGES:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = control_words(template or "") if specials is None else specials
    backend.add_special_tokens(
        [
            AddedToken(w, special=True, normalized=False, rstrip=w in rstrip)
            for w in dict.fromkeys([BOS, EOS, pad, *words])
        ]
    )
    if prepend_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer
