"""A tokenizer trained on the user's own text: byte-level BPE with the special tokens of ChatML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sftdist.data.schema import Conversation

VOCABULARY_VERSION = 1
END_OF_TEXT, TURN_START, TURN_END, PAD = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
SMALLEST = 256 + len(SPECIAL_TOKENS)
# GPT-4's pattern, with digits one by one: numbers are copied and computed digit by digit by small models.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `size` entries (at least 260); the same texts give the same tokenizer.

    Every string can be encoded and decodes to itself. EOS is <|endoftext|>, padding a token of its own, so
    that an end token is never masked for being padding.
    """
    if size < SMALLEST:
        raise ValueError(f"vocabulary size: given {size}, required at least {SMALLEST} (256 bytes and special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )


def texts_of(conversation: Conversation) -> Iterator[str]:
    """What a tokenizer for such conversations has to spell."""
    for message in conversation.messages:
        yield message.role
        yield message.content
        if message.reasoning is not None:
            yield message.reasoning
