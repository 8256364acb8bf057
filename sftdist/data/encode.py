"""From chunks of raw rows to token rows, in this process or in several, always in the order of the input.

The workers parse, hash, render, prove and tokenise; whatever needs to know the other rows (duplicates,
held-out prompts, counts) happens in one place afterwards, so the output does not depend on their number.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from sftdist.core.distributed import PARENT_VARIABLE, die_with_parent
from sftdist.data.clean import normalise
from sftdist.data.keys import content_key, prompt_key
from sftdist.data.mask import Encoded, MaskOptions, Refusal
from sftdist.data.problems import Problem, bad_row, refused_row
from sftdist.data.schema import Conversation
from sftdist.data.sources import Chunk, Part, Source, parse_chunk, raw_text
from sftdist.data.split import split_of
from sftdist.data.template import ChatTemplate

AHEAD = 2  # chunks waiting per worker: enough to keep it busy, few enough to bound memory
FEW_CHUNKS = 4  # an input of fewer chunks than this is done before a second process has started


@dataclass(frozen=True)
class Job:
    """What a worker must know to encode the chunks of one source. `split`: all rows belong there, else by hash."""

    source: Source
    parts: tuple[Part, ...]
    template: ChatTemplate
    mask: MaskOptions
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
class EncodedChunk:
    """A chunk after the workers: one entry per conversation in `contents prompts lines split refused`."""

    part: int
    read: int
    left_out: int
    bad: list[Problem]
    contents: list[bytes]
    prompts: list[bytes]
    lines: NDArray[np.int64]
    split: NDArray[np.uint8]
    refused: dict[int, Problem]
    samples: Samples
    size: int = 0  # that of the chunk


def encode_chunk(job: Job, chunk: Chunk) -> EncodedChunk:
    """Parse, normalise, hash, render, prove and tokenise one chunk."""
    part = job.parts[chunk.part]
    parsed = parse_chunk(chunk, job.source, part)
    conversations = [normalise(conversation) for conversation, _ in parsed.conversations]
    prompts = [prompt_key(conversation) for conversation in conversations]
    found, refusals = encode_conversations(job.template, conversations, job.mask)
    refused = {
        i: refused_row(job.source.name, conversations[i], refusal, raw_text(parsed.conversations[i][1]))
        for i, refusal in refusals.items()
    }
    return EncodedChunk(
        part=chunk.part,
        read=parsed.read,
        left_out=parsed.left_out,
        bad=[bad_row(job.source.name, rejected) for rejected in parsed.rejected],
        contents=[content_key(conversation) for conversation in conversations],
        prompts=prompts,
        lines=np.array([conversation.line for conversation in conversations], dtype=np.int64),
        split=np.array([_split(job, prompt) for prompt in prompts], dtype=np.uint8),
        refused=refused,
        samples=found,
        size=chunk.size,
    )


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


# --- processes ----------------------------------------------------------------------------------------

_jobs: Sequence[Job] = ()  # in a worker: the jobs of its pool, inherited by the fork and never pickled


class Workers:
    """Encodes the chunks of jobs; the processes are forked when the first large input needs them."""

    def __init__(self, jobs: Sequence[Job], count: int) -> None:
        self._jobs, self._count = jobs, count
        self._pool: ProcessPoolExecutor | None = None

    def encode(self, number: int, chunks: Iterable[Chunk]) -> Iterator[EncodedChunk]:
        """The chunks of job `number`, encoded, in the order of the input."""
        chunks = iter(chunks)
        first = list(islice(chunks, FEW_CHUNKS))
        if self._count == 1 or len(first) < FEW_CHUNKS:
            yield from (encode_chunk(self._jobs[number], chunk) for chunk in chain(first, chunks))
        else:
            yield from self._in_order(number, chain(first, chunks))

    def _in_order(self, number: int, chunks: Iterator[Chunk]) -> Iterator[EncodedChunk]:
        pool = self._started()
        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, number, chunk))
            if len(waiting) >= self._count * (1 + AHEAD):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Fork: a worker needs the tokenizer and tables that are in memory here, at once.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_start_worker, initargs=(self._jobs,))
            with _one_tokenizer_thread():
                self._pool.submit(int).result()
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start_worker(jobs: Sequence[Job]) -> None:
    global _jobs
    gc.freeze()  # what was inherited is for ever: the collector need not walk it, nor unshare its pages
    gc.set_threshold(100_000, 20, 20)
    os.environ.pop(PARENT_VARIABLE, None)  # of the process that forked us, whose parent is another
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _jobs = jobs


def _encode_in_worker(number: int, chunk: Chunk) -> EncodedChunk:
    return encode_chunk(_jobs[number], chunk)


@contextmanager
def _one_tokenizer_thread() -> Iterator[None]:
    """The Rust tokenizer warns at a fork unless this is set; the parent gets its threads back afterwards."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
