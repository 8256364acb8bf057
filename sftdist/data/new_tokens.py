"""Tokens that a tokenizer does not know yet (`model.add_tokens`): each becomes one id that no text loses again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from sftdist.core.errors import ConfigError
from sftdist.data.store import TRAIN, TokenStore
from sftdist.data.template import ChatTemplate

KEY = "model.add_tokens"
SCANNED = 1 << 24  # ids looked at in one go


def with_tokens(template: ChatTemplate, tokens: Sequence[str]) -> ChatTemplate:
    """The template over a tokenizer that knows `tokens`; one that it knew before keeps its id.

    They are no special tokens: an answer that holds one keeps it when it is decoded without those. Raises ConfigError
    for a token that is empty, given twice, hides one that the tokenizer has, or would not be one id of its own.
    """
    if not tokens:
        return template
    known = template.tokenizer
    _require_sound(tokens, [token.content for token in known.added_tokens_decoder.values()])
    tokenizer = copy.deepcopy(known)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    found = ChatTemplate(tokenizer, template.text, template.arguments, template.stop_ids)
    names = {number: token for token, number in known.get_vocab().items()}
    for token, number in ids_of(tokenizer, tokens).items():
        if found.ids(token) != [number] or names.get(number, token) != token:
            raise ConfigError(
                f"{KEY}: {token!r} is read as {found.ids(token)} by this tokenizer, required is one id of its own; its "
                "ids may have gaps, or its normaliser changes the token: choose another token, or add it to the "
                "tokenizer's folder yourself"
            )
    return found


def ids_of(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> dict[str, int]:
    """Token -> id, of tokens that the tokenizer knows."""
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}


def require_seen(stores: Sequence[TokenStore], tokens: dict[str, int]) -> None:
    """Raises ConfigError for a token that stands in no train row: its rows would stay as they began."""
    missing = set(tokens.values())
    for store in stores:
        missing -= _among(store, missing)
    unseen = [token for token, number in tokens.items() if number in missing]
    if unseen:
        raise ConfigError(
            f"{KEY}: {', '.join(map(repr, unseen))} in no train row, required in one at least, or nothing is learned "
            "of it; correct its spelling, add rows that hold it, or leave it out"
        )


def _among(store: TokenStore, wanted: set[int]) -> set[int]:
    """Which of these ids the train rows hold; most are found within the first few of them."""
    found: set[int] = set()
    sought = np.array(sorted(wanted))
    for start in range(0, len(store.ids), SCANNED):
        if found == wanted:
            break
        piece = store.ids[start : start + SCANNED]
        places = np.flatnonzero(np.isin(piece, sought))
        rows = np.searchsorted(store.offsets, places + start, side="right") - 1
        found |= set(np.unique(piece[places[store.split[rows] == TRAIN]]).tolist())
    return found


def _require_sound(tokens: Sequence[str], added: Sequence[str]) -> None:
    for i, token in enumerate(tokens):
        if not token.strip():
            raise ConfigError(f"{KEY}: given {token!r}, required tokens with something to see in them; leave it out")
        if token in tokens[:i]:
            raise ConfigError(f"{KEY}: given {token!r} twice, required each token once")
        hidden = [other for other in added if other != token and _hides(token, other)]
        if hidden:
            raise ConfigError(
                f"{KEY}: {token!r} would hide {hidden[0]!r}, which the tokenizer has: texts are cut at the token that "
                "begins first. Required is a token that neither holds it nor ends as it begins; choose another"
            )


def _hides(token: str, other: str) -> bool:
    """Whether some text has `token` take a part of `other`: the first one wins, at one place the longer one."""
    return other in token or any(token.endswith(other[:length]) for length in range(1, len(other)))
