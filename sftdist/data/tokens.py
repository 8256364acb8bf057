"""From rendered text and character spans to ids and token ranges, in batches, proven by decoding.

Text is always tokenised without added special tokens: what the template renders is what is trained, one BOS if it
renders one, none if it does not (as `apply_chat_template(tokenize=True)` and the serving engines do).

Where a token would straddle the border of a span (ChatML's prompt ends with a line feed; an answer that begins with
one would share a token with it), the text is tokenised piece by piece at that border, which is what happens at
inference: the prompt is tokenised alone, and the model goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import Encoding, Tokenizer

from sftdist.data.render import Unproven
from sftdist.data.spans import Span


@dataclass(frozen=True, slots=True)
class Sample:
    """A rendered conversation and the characters of it that are trained, in order."""

    id: str
    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of a sample and, per span, the tokens [start, end) that are trained."""

    ids: list[int]
    ranges: list[tuple[int, int]]


MAX_HEADERS = 256  # cached ones; a template whose headers have no added token has as many as rows


class Encoder:
    """The Rust tokenizer of a Hugging Face tokenizer, without truncation, padding and post-processing.

    Post-processing adds special tokens (never wanted here) and trims white space from offsets.
    """

    def __init__(self, backend: Tokenizer, bos_token_id: int | None) -> None:
        state = json.loads(backend.to_str())
        state |= {"truncation": None, "padding": None, "post_processor": None}
        text = json.dumps(state, ensure_ascii=False, sort_keys=True)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.backend: Tokenizer = Tokenizer.from_str(text)
        self.added: dict[int, str] = {i: t.content for i, t in self.backend.get_added_tokens_decoder().items()}
        self.bos_token_id = bos_token_id
        self._headers: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def tokenise(self, samples: Sequence[Sample]) -> list[Tokens | Unproven]:
        """Token ids and ranges of each sample, or why its text cannot be supervised."""
        encodings = self.backend.encode_batch([s.text for s in samples], add_special_tokens=False)
        found = [self._ranges(sample, encoding) for sample, encoding in zip(samples, encodings, strict=True)]
        return self._prove(samples, found)

    def _ranges(self, sample: Sample, encoding: Encoding) -> Tokens:
        ids: list[int] = encoding.ids
        ranges: list[tuple[int, int]] = []
        for span in sample.spans:
            start = _border(encoding, span.start, len(sample.text), len(ids))
            end = _border(encoding, span.end, len(sample.text), len(ids))
            if end is None:
                end = self._marker_with_space(encoding, sample.text, span.end)
            if start is None or end is None or not self._is_as_sent(encoding, ids, start, sample.text, span.start):
                return self._pieces(sample)
            ranges.append((start, end))
        return Tokens(ids, ranges)

    def _is_as_sent(self, encoding: Encoding, ids: list[int], token: int, text: str, at: int) -> bool:
        """Whether the prompt before a span has the tokens that it has without the answer behind it.

        GPT-2's pattern, for one, splits "\\n\\n" before a word and keeps it whole at the end of a text. What stands
        before an added token has no influence behind it, so only the header's own text is tokenised again, once.
        """
        first = token
        while first > 0 and ids[first - 1] not in self.added:
            first -= 1
        begin = _characters(encoding, first - 1)[1] if first > 0 else 0
        header = text[begin:at]
        if header not in self._headers:
            if len(self._headers) >= MAX_HEADERS:
                self._headers.clear()
            self._headers[header] = self.ids(header)
        return self._headers[header] == ids[first:token]

    def _marker_with_space(self, encoding: Encoding, text: str, end: int) -> int | None:
        """The token after an end marker that swallows the white space behind it (`rstrip`, as in Phi-3)."""
        last = encoding.char_to_token(end - 1)
        if last is None or encoding.ids[last] not in self.added:
            return None
        return int(last) + 1 if text[end : _characters(encoding, last)[1]].isspace() else None

    def _pieces(self, sample: Sample) -> Tokens:
        """Tokenise with a cut at every border of a span."""
        cuts = _cuts(sample)
        parts = [sample.text[a:b] for a, b in pairwise(cuts)]
        ids: list[int] = []
        first: list[int] = []  # first token of each piece
        for encoding in self.backend.encode_batch(parts, add_special_tokens=False):
            first.append(len(ids))
            ids += encoding.ids
        first.append(len(ids))
        at = dict(zip(cuts, first, strict=True))
        return Tokens(ids, [(at[s.start], at[s.end]) for s in sample.spans])

    def offsets(self, sample: Sample, tokens: Tokens) -> list[tuple[int, int]]:
        """Characters of each token, for display: no character twice, and none beyond the end of a token's span.

        A character of several tokens belongs to the first of them; the others have start = end.
        """
        encoding = self.backend.encode(sample.text, add_special_tokens=False)
        found = encoding.offsets
        if encoding.ids != tokens.ids:
            found = []
            for a, b in pairwise(_cuts(sample)):
                piece = self.backend.encode(sample.text[a:b], add_special_tokens=False)
                found += [(a + start, a + end) for start, end in piece.offsets]
        borders = sorted(s.end for s in sample.spans)
        clean, reached = [], 0
        for start, end in found:
            start = max(start, reached)
            border = bisect_left(borders, start + 1)
            if border < len(borders) and start < borders[border] < end:
                end = borders[border]
            reached = max(start, end)
            clean.append((start, reached))
        return clean

    def _prove(self, samples: Sequence[Sample], found: Sequence[Tokens]) -> list[Tokens | Unproven]:
        """The supervised tokens must decode to exactly the supervised text."""
        wanted = [
            (i, start, end, sample.text[span.start : span.end], span.turn)
            for i, (sample, tokens) in enumerate(zip(samples, found, strict=True))
            for span, (start, end) in zip(sample.spans, tokens.ranges, strict=True)
        ]
        parts = [found[i].ids[start:end] for i, start, end, _, _ in wanted]
        decoded = self.backend.decode_batch(parts, skip_special_tokens=False)
        proven: list[Tokens | Unproven] = list(found)
        for (i, start, end, text, turn), given in zip(wanted, decoded, strict=True):
            if given != text and not self._decodes_in_context(found[i].ids, start, end, text):
                detail = f"turn {turn} is {text[:200]!r}, its tokens decode to {given[:200]!r}"
                proven[i] = Unproven("tokens do not decode to the text", detail, turn)
        for i, tokens in enumerate(found):
            if tokens.ids[:2] == [self.bos_token_id] * 2:
                given = f"the rendered text begins with two BOS tokens: {samples[i].text[:60]!r}"
                proven[i] = Unproven("BOS twice", f"{given}; correct the template, which renders both")
        return proven

    def _decodes_in_context(self, ids: Sequence[int], start: int, end: int, text: str) -> bool:
        """For decoders that treat the first token differently, and tokenizers that normalise (NFC)."""
        before = self.backend.decode(ids[:start], skip_special_tokens=False)
        whole = self.backend.decode(ids[:end], skip_special_tokens=False)
        if not whole.startswith(before):
            return False
        given, normalizer = whole[len(before) :], self.backend.normalizer
        return given == text or (normalizer is not None and given == normalizer.normalize_str(text))


def _cuts(sample: Sample) -> list[int]:
    return sorted({0, len(sample.text), *(c for span in sample.spans for c in (span.start, span.end))})


def _border(encoding: Encoding, at: int, length: int, count: int) -> int | None:
    """The first token at or after a character; None when a token lies on both sides of it."""
    if at >= length:
        return count
    after = next((t for c in range(at, length) if (t := encoding.char_to_token(c)) is not None), None)
    if after is None:
        return count
    return int(after) if _characters(encoding, after)[0] >= at else None


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    found = encoding.token_to_chars(token)
    assert found is not None  # without post-processing every token comes from the text
    return found
