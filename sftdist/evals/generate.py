"""What a model answers, the same every time: greedily, in batches that are formed first and then dealt to the ranks.

Prompts go through the training template, so the model is asked with the tokens it was trained on. In float32 on a CPU
an answer is the same in any batch and on any number of ranks; elsewhere it is the same for the same batch, and batches
do not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sftdist.core.distributed import World
from sftdist.core.storage import sha256_json
from sftdist.evals.backends.interface import Engine, Ids
from sftdist.evals.cache import AnswerCache
from sftdist.evals.decoding import Decoding
from sftdist.evals.engines import load_engine
from sftdist.evals.pace import silent
from sftdist.evals.prompts import Answer, Prompt
from sftdist.evals.voice import Voice


@dataclass(frozen=True)
class Batch:
    """Prompts that are answered together, and the most new tokens of each answer."""

    prompts: tuple[Ids, ...]
    room: int


def answers(
    load: Callable[[], Engine],
    prompts: Sequence[Prompt],
    *,
    voice: Voice,
    decoding: Decoding,
    world: World,
    cache: AnswerCache | None = None,
    progress: Callable[[int, int], None] = silent,
) -> list[Answer]:
    """The answer to each prompt, in order, on every rank. Collective.

    `load` is called on the ranks that have something to ask, and nowhere when `cache` holds all answers; rank 0 reads
    the cache, every rank adds to it batch by batch. `progress(done, all)` counts prompts: what rank 0 has done stands
    for the others, too. Prompts of the same tokens are asked once. Raises DataError as `Voice.encode` does.
    """
    asked = [voice.encode(prompt) for prompt in prompts]
    known: dict[str, Answer] = world.broadcast_object(cache.read() if cache is not None and world.is_main else {})
    keys, todo = _work(set(asked), known, voice, decoding)
    mine, missing = todo[world.rank :: world.size], sum(keys[ids] not in known for ids in asked)
    progress(len(asked) - missing, len(asked))
    engine, new = load() if mine else None, dict[str, Answer]()
    for number, batch in enumerate(mine, start=1):
        assert engine is not None, "it is loaded where there is a batch"
        world.progress.note("answering")
        said = engine.continued(batch.prompts, batch.room)
        fresh = {keys[ids]: voice.read(answer) for ids, answer in zip(batch.prompts, said, strict=True)}
        if cache is not None:
            cache.add(fresh)
        new |= fresh
        progress(len(asked) - missing + missing * number // len(mine), len(asked))
    for found in world.gather_objects(new):
        known |= found
    return [replace(known[keys[ids]], opened=voice.opens(ids)) for ids in asked]


def batches_of(prompts: Iterable[Ids], voice: Voice, decoding: Decoding) -> list[Batch]:
    """The longest prompts first: what does not fit into memory shows at once, and like lengths leave little padding.

    The order of `prompts` makes no difference. A prompt that leaves less room for its answer than others have shares a
    batch only with those that leave as little.
    """
    batches: list[Batch] = []
    for ids in sorted(prompts, key=lambda ids: (-len(ids), ids)):
        room = voice.room(ids, decoding.max_new_tokens)
        last = batches[-1] if batches else None
        if last is not None and last.room == room and len(last.prompts) < decoding.prompts_at_a_time:
            batches[-1] = Batch((*last.prompts, ids), room)
        else:
            batches.append(Batch((ids,), room))
    return batches


def ask(folder: Path, prompts: Sequence[Prompt], *, max_new_tokens: int = 256, batch_size: int = 32) -> list[Answer]:
    """What the model or adapter in a folder says, in float32 on this process's CPU, without a cache."""
    cpu, voice = torch.device("cpu"), Voice.load(folder)
    decoding = Decoding(max_new_tokens, batch_size)

    def load() -> Engine:
        return load_engine(folder, voice, decoding, cpu)

    return answers(load, prompts, voice=voice, decoding=decoding, world=World(0, 1, 0, cpu))


def _work(
    prompts: set[Ids], known: dict[str, Answer], voice: Voice, decoding: Decoding
) -> tuple[dict[Ids, str], list[Batch]]:
    """The key of each prompt's answer, and the batches that are still to be answered.

    Where an answer depends on its batch, the batch is in the key, and is answered as a whole or not at all.
    """
    if decoding.free_of_batches:
        keys = {ids: sha256_json(ids) for ids in prompts}
        return keys, batches_of([ids for ids in prompts if keys[ids] not in known], voice, decoding)
    batches, keys = batches_of(prompts, voice, decoding), {}
    for batch in batches:
        name = sha256_json(batch.prompts)
        keys |= {ids: f"{name}-{place}" for place, ids in enumerate(batch.prompts)}
    return keys, [batch for batch in batches if any(keys[ids] not in known for ids in batch.prompts)]
