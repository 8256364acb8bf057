"""From chunks of raw rows to token rows: everything that can be said of a row without knowing the others.

What needs to know the other rows (duplicates, contradictions, counts) happens in one place afterwards, so the output
does not depend on how many processes do this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftdist.core.settings import TrainOn
from sftdist.data.clean import Rules, normalise
from sftdist.data.findings import Checks, findings_of
from sftdist.data.held_out import to_json
from sftdist.data.keys import DIGEST_BYTES, answer_key, content_key, prompt_key
from sftdist.data.lint import Lint
from sftdist.data.mask import Encoded, MaskOptions, Refusal
from sftdist.data.near import Near, signatures
from sftdist.data.problems import Problem, bad_row, refused_row
from sftdist.data.schema import Conversation
from sftdist.data.sources import Chunk, Part, Source, parse_chunk, raw_text
from sftdist.data.split import split_of
from sftdist.data.store import TRAIN
from sftdist.data.template import ChatTemplate

Label = tuple[tuple[str, ...], str | None]  # the tags of a conversation, and where its labels come from


@dataclass(frozen=True)
class Job:
    """What a worker must know to encode the chunks of one source. `split`: all rows belong there, else by hash."""

    source: Source
    parts: tuple[Part, ...]
    template: ChatTemplate
    mask: MaskOptions
    rules: Rules = field(default_factory=Rules)
    near: Near | None = None
    checks: Checks = field(default_factory=Checks)
    validation: float = 0.0
    holdout: float = 0.0
    split: int | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """Token rows, column by column; `of` int64 [M] is the conversation (place in the chunk) of each."""

    of: NDArray[np.int64]
    lengths: NDArray[np.int32]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    names: list[str]


@dataclass(frozen=True, slots=True)
class Columns:
    """What deciding over all rows needs of each conversation; the digests are uint8 [n, DIGEST_BYTES]."""

    contents: NDArray[np.uint8]
    prompts: NDArray[np.uint8]
    answers: NDArray[np.uint8]
    split: NDArray[np.uint8]
    refused: NDArray[np.bool_]
    flags: NDArray[np.uint8]

    @classmethod
    def joined(cls, several: Sequence[Columns]) -> Columns:
        """End to end."""
        digest = np.empty((0, DIGEST_BYTES), dtype=np.uint8)
        return cls(
            contents=np.concatenate([digest, *(one.contents for one in several)]),
            prompts=np.concatenate([digest, *(one.prompts for one in several)]),
            answers=np.concatenate([digest, *(one.answers for one in several)]),
            split=np.concatenate([np.empty(0, dtype=np.uint8), *(one.split for one in several)]),
            refused=np.concatenate([np.empty(0, dtype=bool), *(one.refused for one in several)]),
            flags=np.concatenate([np.empty(0, dtype=np.uint8), *(one.flags for one in several)]),
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """Some chunks after the workers: one entry per conversation in `columns row_ids files lines labels`.

    `files` int32 [n] are numbers of parts, `labels` uint32 [n] places in `label_names`. By the place of their row:
    `refused`, the problem of a mask that is not proven, `findings`, what else is wrong, and `held_out`, the rows that
    are not trained on as JSON (`data.held_out`). `rules` counts the
    conversations that each rule of cleaning has changed, `lint` is what `Lint` saw in the train rows. `size` is that
    of the input in bytes, 0 where nobody knows.
    """

    read: int
    left_out: int
    size: int
    bad: list[Problem]
    refused: dict[int, Problem]
    findings: dict[int, list[Problem]]
    held_out: dict[int, dict[str, Any]]
    rules: Counter[str]
    lint: dict[str, Any]
    columns: Columns
    row_ids: list[str]
    files: NDArray[np.int32]
    lines: NDArray[np.int64]
    labels: NDArray[np.uint32]
    label_names: list[Label]
    signatures: NDArray[np.uint16] | None
    samples: Samples

    @property
    def rows(self) -> int:
        return len(self.row_ids)

    def load(self) -> Shard:
        """Itself: it is in memory already."""
        return self


def encode_chunk(job: Job, chunk: Chunk) -> Shard:
    """Parse, normalise, hash, render, prove and tokenise one chunk."""
    part = job.parts[chunk.part]
    parsed = parse_chunk(chunk, job.source, part)
    roles = job.template.trimmed_roles
    cleaned = [normalise(conversation, job.rules, roles) for conversation, _ in parsed.conversations]
    conversations = [conversation for conversation, _ in cleaned]
    prompts = [prompt_key(conversation) for conversation in conversations]
    found, refusals = encode_conversations(job.template, conversations, job.mask)
    refused = {
        i: refused_row(job.source.name, conversations[i], refusal, raw_text(parsed.conversations[i][1]))
        for i, refusal in refusals.items()
    }
    rows = len(conversations)
    is_refused = np.zeros(rows, dtype=bool)
    is_refused[list(refused)] = True
    split = np.array([_split(job, prompt) for prompt in prompts], dtype=np.uint8)
    near = None if job.near is None else signatures(conversations, job.near)
    findings = findings_of(job.checks, job.source.name, conversations, split, near, job.mask.train_on)
    flags = np.zeros(rows, dtype=np.uint8)
    flags[list(findings)] = [job.checks.flags(several) for several in findings.values()]
    names, labels = _labels(conversations)
    return Shard(
        read=parsed.read,
        left_out=parsed.left_out,
        size=chunk.size,
        bad=[bad_row(job.source.name, rejected) for rejected in parsed.rejected],
        refused=refused,
        findings=findings,
        held_out={i: to_json(row) for i, (row, s) in enumerate(zip(conversations, split, strict=True)) if s != TRAIN},
        lint=_lint([row for row, where in zip(conversations, split, strict=True) if where == TRAIN], job.mask.train_on),
        rules=Counter(rule for _, used in cleaned for rule in used),
        columns=Columns(
            contents=_digests(content_key(conversation) for conversation in conversations),
            prompts=_digests(prompts),
            answers=_digests(answer_key(conversation) for conversation in conversations),
            split=split,
            refused=is_refused,
            flags=flags,
        ),
        row_ids=[conversation.id for conversation in conversations],
        files=np.full(rows, chunk.part, dtype=np.int32),
        lines=np.array([conversation.line for conversation in conversations], dtype=np.int64),
        labels=labels,
        label_names=names,
        signatures=near,
        samples=found,
    )


def joined(shards: Sequence[Shard]) -> Shard:
    """Several chunks as one, in their order; at least one."""
    starts = np.cumsum([0, *(len(shard.row_ids) for shard in shards)]).tolist()
    names: dict[Label, int] = {}
    labels = [renumbered(shard.labels, shard.label_names, names) for shard in shards]
    samples = [shard.samples for shard in shards]
    return Shard(
        read=sum(shard.read for shard in shards),
        left_out=sum(shard.left_out for shard in shards),
        size=sum(shard.size for shard in shards),
        bad=[problem for shard in shards for problem in shard.bad],
        refused={
            start + i: problem
            for start, shard in zip(starts, shards, strict=False)
            for i, problem in shard.refused.items()
        },
        findings={
            start + i: problems
            for start, shard in zip(starts, shards, strict=False)
            for i, problems in shard.findings.items()
        },
        held_out={
            start + i: row for start, shard in zip(starts, shards, strict=False) for i, row in shard.held_out.items()
        },
        lint=_merged_lint(shard.lint for shard in shards),
        rules=sum((shard.rules for shard in shards), Counter()),
        columns=Columns.joined([shard.columns for shard in shards]),
        row_ids=[name for shard in shards for name in shard.row_ids],
        files=np.concatenate([shard.files for shard in shards]),
        lines=np.concatenate([shard.lines for shard in shards]),
        labels=np.concatenate(labels),
        label_names=list(names),
        signatures=_end_to_end([shard.signatures for shard in shards]),
        samples=Samples(
            of=np.concatenate([start + one.of for start, one in zip(starts, samples, strict=False)]),
            lengths=np.concatenate([one.lengths for one in samples]),
            ids=np.concatenate([one.ids for one in samples]),
            weights=np.concatenate([one.weights for one in samples]),
            names=[name for one in samples for name in one.names],
        ),
    )


def _lint(conversations: Iterable[Conversation], train_on: TrainOn) -> dict[str, Any]:
    lint = Lint()
    for conversation in conversations:
        lint.observe(conversation, train_on)
    return lint.to_json()


def _merged_lint(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    lint = Lint.merged(parts)
    lint.read_ahead()
    return lint.to_json()


def _end_to_end(several: Sequence[NDArray[np.uint16] | None]) -> NDArray[np.uint16] | None:
    found = [one for one in several if one is not None]
    return np.concatenate(found) if found else None


def _labels(conversations: Sequence[Conversation]) -> tuple[list[Label], NDArray[np.uint32]]:
    names: dict[Label, int] = {}
    labels = [
        names.setdefault((conversation.tags, conversation.label_origin), len(names)) for conversation in conversations
    ]
    return list(names), np.array(labels, dtype=np.uint32)


def renumbered(labels: NDArray[np.uint32], names: Sequence[Label], among: dict[Label, int]) -> NDArray[np.uint32]:
    """Labels of a shard as numbers in a longer list, which grows by what is new."""
    numbers = [among.setdefault(name, len(among)) for name in names]
    return np.array(numbers, dtype=np.uint32)[labels]


def _digests(keys: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _split(job: Job, prompt: bytes) -> int:
    return split_of(prompt, validation=job.validation, holdout=job.holdout) if job.split is None else job.split


def encode_conversations(
    template: ChatTemplate, conversations: Sequence[Conversation], mask: MaskOptions
) -> tuple[Samples, dict[int, Refusal]]:
    """All proven samples, and the first refusal of each conversation that has one (it then has no samples)."""
    numbered = [replace(conversation, id=str(i)) for i, conversation in enumerate(conversations)]
    refusals: dict[int, Refusal] = {}
    encoded: list[tuple[int, Encoded]] = []
    for entry in template.encode(numbered, mask):
        i = int(entry.id.partition("#")[0])
        if isinstance(entry, Refusal):
            refusals.setdefault(i, entry)
        else:
            encoded.append((i, entry))
    kept = [(i, entry) for i, entry in encoded if i not in refusals]
    names = [conversations[i].id + "".join(entry.id.partition("#")[1:]) for i, entry in kept]
    return _columns(kept, names), refusals


def _columns(kept: list[tuple[int, Encoded]], names: list[str]) -> Samples:
    entries = [entry for _, entry in kept]
    return Samples(
        of=np.array([i for i, _ in kept], dtype=np.int64),
        lengths=np.array([len(entry.ids) for entry in entries], dtype=np.int32),
        ids=np.concatenate([np.empty(0, np.int32), *(entry.ids for entry in entries)]),
        weights=np.concatenate([np.empty(0, np.float32), *(entry.weights for entry in entries)]),
        names=names,
    )
