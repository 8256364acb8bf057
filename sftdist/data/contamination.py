"""Evaluation prompts that are kept out of training: rows that quote one of them, or whose prompt is nearly one.

Quoting is what the GPT-3 paper counts as an overlap (Brown et al. 2020, appendix C): 13 words in a row, without case
and punctuation; for a prompt of 8 to 12 words all of its words. A shorter prompt is found only as a whole user turn,
for a few words in a row prove nothing. Words in a row that more than 10 prompts share are taken for the evaluation's
template, as the paper ignores those that many training documents share. A character of a script without spaces is a
word here, so that 13 of them are a shorter quotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.errors import DataError
from sftdist.core.settings import RowShape
from sftdist.data.jsonline import decode_line
from sftdist.data.near import (
    Near,
    common_shingles,
    grams,
    near_of,
    prompt_text,
    text_signatures,
    whole_text,
    words,
)
from sftdist.data.rowerror import RowError
from sftdist.data.schema import Conversation, parse
from sftdist.data.sources import Source, chunks, parts_of

CONTAMINATION_VERSION = 2
QUOTED, FEWEST = 13, 8  # words in a row
TEMPLATE_PROMPTS = 10  # words in a row that more prompts have say nothing
PLAIN_TEXT = (".txt", ".md")
TEXT_KEYS = ("prompt", "question", "instruction")
TURN_KEYS = {"messages": ("role", "assistant", "content"), "conversations": ("from", "gpt", "value")}


@dataclass(frozen=True)
class Grams:
    """Sorted hashes uint64 of words in a row, and the prompt that each is of."""

    hashes: NDArray[np.uint64]
    prompts: NDArray[np.int64]

    def first_in(self, wanted: NDArray[np.uint64]) -> int | None:
        """The prompt of the first of these hashes that is here."""
        at = np.searchsorted(self.hashes, wanted)
        at[at == len(self.hashes)] = 0
        if not len(self.hashes):
            return None
        hits = np.flatnonzero(self.hashes[at] == wanted)
        return int(self.prompts[at[hits[0]]]) if len(hits) else None


@dataclass(frozen=True)
class Contamination:
    """The prompts of some files, ready to be looked for. `names`: FILE:LINE of each; `quoted`: by number of words."""

    near: Near
    names: tuple[str, ...]
    quoted: dict[int, Grams]
    whole: Grams
    signatures: NDArray[np.uint16]
    common: NDArray[np.bool_]

    @classmethod
    def load(cls, files: Iterable[Path], near: Near) -> Contamination:
        """Read JSONL or parquet rows of any shape, or with `prompt` or `question` alone; of a .txt or .md file each
        line is a prompt. `DataError` where a row has no prompt."""
        return cls.of_prompts([prompt for file in files for prompt in _prompts(file)], near)

    @classmethod
    def of_prompts(cls, named: Sequence[tuple[str, str]], near: Near) -> Contamination:
        """From pairs of a name and a text; a text without a word is left out."""
        said: dict[bytes, tuple[str, str, NDArray[np.uint64]]] = {}
        for name, text in named:
            hashes = words(text)
            if len(hashes):
                said.setdefault(hashes.tobytes(), (name, text, hashes))
        names, texts, spoken = zip(*said.values(), strict=True) if said else ((), (), ())
        signatures = text_signatures(texts, near)
        by_size: dict[int, list[int]] = {}
        for prompt, hashes in enumerate(spoken):
            if len(hashes) >= FEWEST:
                by_size.setdefault(min(QUOTED, len(hashes)), []).append(prompt)
        return cls(
            near=near,
            names=names,
            quoted={
                size: _telling([(prompt, grams(spoken[prompt], size)) for prompt in prompts])
                for size, prompts in sorted(by_size.items(), reverse=True)
            },
            whole=_telling([(prompt, grams(hashes, len(hashes))) for prompt, hashes in enumerate(spoken)]),
            signatures=signatures,
            common=common_shingles(signatures, np.arange(len(names))),
        )

    def of(self, conversations: Sequence[Conversation], signatures: NDArray[np.uint16]) -> list[str | None]:
        """For each conversation what it shares with which prompt, or None; `signatures` [n, 2, 128] are theirs."""
        alike = near_of(signatures[:, 1], self.signatures, self.near.of_prompts, common=self.common).tolist()
        return [self._of(*one) for one in zip(conversations, alike, strict=True)]

    def _of(self, conversation: Conversation, alike: int) -> str | None:
        if alike >= 0:
            return f"its prompt is nearly that of {self.names[alike]}"
        for message in conversation.messages:
            if message.role == "user":
                spoken = words(message.content)
                if (found := self.whole.first_in(grams(spoken, len(spoken)))) is not None:
                    return f"a user turn is the prompt of {self.names[found]}"
        spoken = words(whole_text(conversation))
        for size, quoted in self.quoted.items():
            if (found := quoted.first_in(grams(spoken, size))) is not None:
                return f"shares {size} words in a row with the prompt of {self.names[found]}"
        return None


def _telling(found: Sequence[tuple[int, NDArray[np.uint64]]]) -> Grams:
    """The grams of these prompts, without those that too many of them share; of the others the first prompt counts."""
    if not found:
        return Grams(np.empty(0, np.uint64), np.empty(0, np.int64))
    own = [np.unique(hashes) for _, hashes in found]
    owners = np.repeat([prompt for prompt, _ in found], [len(hashes) for hashes in own])
    hashes, first, count = np.unique(np.concatenate(own), return_index=True, return_counts=True)
    telling = count <= TEMPLATE_PROMPTS
    return Grams(hashes[telling], owners[first[telling]].astype(np.int64))


# --- prompts of files -----------------------------------------------------------------------------------


def _prompts(file: Path) -> Iterator[tuple[str, str]]:
    source = Source("evaluation", str(file), key="data.decontaminate")
    parts = parts_of(source)
    if file.suffix in PLAIN_TEXT:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from ((f"{file.name}:{number}", line) for number, line in enumerate(lines, start=1))
        return
    for chunk in chunks(parts):
        shown = parts[chunk.part].shown
        for line, raw in chunk.rows:
            try:
                row = decode_line(raw, torn=False) if isinstance(raw, bytes) else raw
                yield f"{Path(shown).name}:{line}", prompt_of(row)
            except RowError as problem:
                raise DataError(f"{shown}:{line}: {problem}") from None


def prompt_of(row: object) -> str:
    """The prompt of a row of any shape; the answer may be absent. `RowError` where there is none."""
    whole = _parsed(row)
    found = whole if isinstance(whole, Conversation) else _parsed(_answered(row))
    if isinstance(found, Conversation):
        return prompt_text(found)
    raise RowError("row", found.given, f"a prompt ({' | '.join((*TEXT_KEYS, *TURN_KEYS))})", "no prompt")


def _parsed(row: object) -> Any:
    return parse(row, RowShape.auto, file="", line=0, id=None)


def _answered(row: object) -> object:
    """A row that is only a question, with some answer to it."""
    if not isinstance(row, Mapping):
        return row
    for key, (who, answerer, what) in TURN_KEYS.items():
        if isinstance(row.get(key), Sequence):
            return {key: [*row[key], {who: answerer, what: "-"}]}
    asked = next((row[key] for key in TEXT_KEYS if row.get(key)), None)
    if asked is not None and row.get("instruction") == asked and row.get("input"):
        asked = f"{asked}\n\n{row['input']}"
    return row if asked is None else {"prompt": asked, "completion": "-"}
