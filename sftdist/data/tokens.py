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
from sftdist.data.words import WordEncoding, Words


@dataclass(frozen=True, slots=True)
class Sample:
    """A rendered conversation and the characters of it that are trained, in order."""

    id: str
    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of a sample and, per span, the tokens [start, end) that are trained.

    `cuts`: the borders of spans (characters) where the text was tokenised in pieces.
    """

    ids: list[int]
    ranges: list[tuple[int, int]]
    cuts: tuple[int, ...] = ()


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
        self._words = Words.of(self.backend, state)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def tokenise(self, samples: Sequence[Sample]) -> list[Tokens | Unproven]:
        """Token ids and ranges of each sample, or why its text cannot be supervised."""
        encodings = self._encode([s.text for s in samples])
        found = [self._ranges(sample, encoding) for sample, encoding in zip(samples, encodings, strict=True)]
        return self._prove(samples, found)

    def _encode(self, texts: list[str]) -> list[Encoding | WordEncoding]:
        """All texts in one batch of the Rust tokenizer, but for those that the words that it knows make up."""
        words = self._words
        if words is None:
            return list(self.backend.encode_batch(texts, add_special_tokens=False))
        plain = iter(self.backend.encode_batch([t for t in texts if not t.isascii()], add_special_tokens=False))
        return [words.encode(text) if text.isascii() else next(plain) for text in texts]

    def _ranges(self, sample: Sample, encoding: Encoding | WordEncoding) -> Tokens | Unproven:
        text, ids = sample.text, encoding.ids
        cuts: list[int] = []
        ranges: list[tuple[int, int]] = []
        for span in sample.spans:
            start, end = _border(encoding, span.start, text), self._end(encoding, span.end, text)
            if start is None or not self._is_as_sent(encoding, ids, start, text, span.start):
                cuts.append(span.start)
            if end is None:
                cuts.append(span.end)
            ranges.append((start or 0, end or 0))
        return self._in_pieces(sample, tuple(cuts), ids) if cuts else Tokens(ids, ranges)

    def _end(self, encoding: Encoding | WordEncoding, at: int, text: str) -> int | None:
        """The token after the end of a span; a marker that swallows the white space behind it (`rstrip`, as in
        Phi-3) is one token and ends there."""
        end = _border(encoding, at, text)
        if end is not None:
            return end
        last = encoding.char_to_token(at - 1)
        if last is None or encoding.ids[last] not in self.added:
            return None
        return int(last) + 1 if text[at : _characters(encoding, last)[1]].isspace() else None

    def _is_as_sent(self, encoding: Encoding | WordEncoding, ids: list[int], token: int, text: str, at: int) -> bool:
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

    def _in_pieces(self, sample: Sample, cuts: tuple[int, ...], whole: list[int]) -> Tokens | Unproven:
        """Tokenise with a cut at each border that the tokenizer does not keep; the text must stay the same."""
        pieces = _pieces(sample.text, cuts)
        encodings = self.backend.encode_batch([piece for _, piece in pieces], add_special_tokens=False)
        ids: list[int] = []
        starts: dict[int, int] = {}
        ends: dict[int, int | None] = {}
        for (base, piece), encoding in zip(pieces, encodings, strict=True):
            for span in sample.spans:
                if base <= span.start < base + len(piece):
                    starts[span.start] = len(ids) + (_border(encoding, span.start - base, piece) or 0)
                if base < span.end <= base + len(piece):
                    end = self._end(encoding, span.end - base, piece)
                    ends[span.end] = None if end is None else len(ids) + end
            ids += encoding.ids
        # A tokenizer that puts a space before each piece (SentencePiece's dummy prefix) would add it to the text.
        same = self._decode(ids) in (self._decode(whole), "".join(self._decode(e.ids) for e in encodings))
        ranges = [(starts[span.start], end) for span in sample.spans if (end := ends[span.end]) is not None]
        if not same or len(ranges) < len(sample.spans):
            at = cuts[0]
            given = f"{sample.text[max(0, at - 20) : at]!r} before a span and {sample.text[at : at + 20]!r} in it"
            detail = f"the tokenizer joins {given}, and changes the text when it is cut between them"
            return Unproven("tokens cross the border of a span", detail)
        return Tokens(ids, ranges, cuts)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text

    def offsets(self, sample: Sample, tokens: Tokens) -> list[tuple[int, int]]:
        """Characters of each token, for display: no character twice, and none beyond the end of a token's span.

        A character of several tokens belongs to the first of them; the others have start = end.
        """
        found: list[tuple[int, int]] = []
        for base, piece in _pieces(sample.text, tokens.cuts):
            encoding = self.backend.encode(piece, add_special_tokens=False)
            found += [(base + start, base + end) for start, end in encoding.offsets]
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

    def _prove(self, samples: Sequence[Sample], found: Sequence[Tokens | Unproven]) -> list[Tokens | Unproven]:
        """The supervised tokens must decode to exactly the supervised text."""
        proven: list[Tokens | Unproven] = list(found)
        wanted = [
            (i, tokens, bounds, sample.text[span.start : span.end], span.turn)
            for i, (sample, tokens) in enumerate(zip(samples, found, strict=True))
            if isinstance(tokens, Tokens)
            for span, bounds in zip(sample.spans, tokens.ranges, strict=True)
        ]
        parts = [tokens.ids[start:end] for _, tokens, (start, end), _, _ in wanted]
        decoded = self.backend.decode_batch(parts, skip_special_tokens=False)
        for (i, tokens, bounds, text, turn), given in zip(wanted, decoded, strict=True):
            if given != text and not self._decodes_in_context(tokens.ids, *bounds, text):
                detail = f"turn {turn} is {text[:200]!r}, its tokens decode to {given[:200]!r}"
                proven[i] = Unproven("tokens do not decode to the text", detail, turn)
            elif tokens.ids[:2] == [self.bos_token_id] * 2:
                given = f"the rendered text begins with two BOS tokens: {samples[i].text[:60]!r}"
                proven[i] = Unproven("BOS twice", f"{given}; correct the template, which renders both")
        return proven

    def _decodes_in_context(self, ids: Sequence[int], start: int, end: int, text: str) -> bool:
        """For decoders that treat the first token differently, and tokenizers that normalise (NFC)."""
        before, whole = self._decode(ids[:start]), self._decode(ids[:end])
        if not whole.startswith(before):
            return False
        given, normalizer = whole[len(before) :], self.backend.normalizer
        return given == text or (normalizer is not None and given == normalizer.normalize_str(text))


def _pieces(text: str, cuts: Sequence[int]) -> list[tuple[int, str]]:
    """The text between cuts, each with its first character's place."""
    edges = [0, *cuts, len(text)]
    return [(start, text[start:end]) for start, end in pairwise(edges) if start < end]


def _border(encoding: Encoding | WordEncoding, at: int, text: str) -> int | None:
    """The first token at or after a character; None when a token lies on both sides of it."""
    if at == 0:
        return 0
    after = next((t for c in range(at, len(text)) if (t := encoding.char_to_token(c)) is not None), None)
    if after is None:
        return len(encoding.ids)
    return int(after) if _characters(encoding, after)[0] >= at else None


def _characters(encoding: Encoding | WordEncoding, token: int) -> tuple[int, int]:
    found = encoding.token_to_chars(token)
    assert found is not None  # without post-processing every token comes from the text
    return found
