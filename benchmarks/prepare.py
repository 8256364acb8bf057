"""Render, mask and tokenise: rows per second of prepare's workers beside `datasets.map` over `apply_chat_template`.

    python -m benchmarks.prepare [--processes 1 2] [--rounds 3] [--copies 1]

The rows are the three sources of the real chat data, the tokenizer an 8k BPE trained on them, the template ChatML; for
`datasets.map` with hand-set `{% generation %}` tags around what is trained, so that `return_assistant_tokens_mask`
works. Ours starts from the raw JSON lines and also parses, hashes and proves every row; the map starts from an Arrow
table. Rows whose ids or masks differ between the two are counted ("rows that differ"). Each round runs both, one
after the other, processes started anew; the Rust tokenizer uses one thread a process on both sides. Writes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.machine import Result, command, load, shared_data
from sftdist.data.clean import Rules
from sftdist.data.encode import Job, Samples, encode_chunk
from sftdist.data.mask import MaskOptions
from sftdist.data.pipeline import PrepareRequest, SourceRequest, prepare
from sftdist.data.schema import Conversation
from sftdist.data.shards import works
from sftdist.data.sources import Source, chunks, conversations, parts_of, places
from sftdist.data.template import ChatTemplate
from sftdist.data.vocabulary import texts_of, train_tokenizer
from sftdist.data.workers import Workers

VOCABULARY = 8192
# The built-in ChatML with the tags that transformers needs to find the assistant's tokens.
TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Setting:
    """What both sides work on."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    table: datasets.Dataset


def ours(setting: Setting, processes: int) -> int:
    """Raw lines to ids and weights in shards on the disk, as prepare does it; how many rows."""
    job, found = _job(setting), places(parts_of(setting.source))
    workers = Workers([job], processes)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return sum(shard.read for shard in workers.make(works(0, found, Path(folder))))
        finally:
            workers.close()


def _job(setting: Setting) -> Job:
    return Job(setting.source, tuple(parts_of(setting.source)), setting.template, MaskOptions())


def mapped(setting: Setting, processes: int, batched: bool) -> datasets.Dataset:
    """The same by `datasets.map`; one process runs in this one, as without `num_proc`."""
    tagged = setting.tokenizer

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        found = tagged.apply_chat_template(
            rows["messages"], chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    return setting.table.map(
        encode,
        batched=batched,
        num_proc=processes if processes > 1 else None,
        remove_columns=setting.table.column_names,
        load_from_cache_file=False,
        new_fingerprint=f"benchmark-{time.monotonic_ns()}",
    )


def rows_that_differ(setting: Setting) -> int:
    """Rows with other ids or another mask; more than one in a thousand, and the comparison means nothing.

    They do differ where an answer begins with a line feed: apply_chat_template joins it with the line feed of the
    prompt into one token, which the model would never see at inference.
    """
    job = replace(_job(setting), rules=Rules(False, False, False, False))  # the same texts on both sides
    encoded = [row for chunk in chunks(job.parts) for row in _rows(encode_chunk(job, chunk).samples)]
    table = mapped(setting, 1, batched=True)
    pairs = zip(encoded, table["input_ids"], table["assistant_masks"], strict=True)
    differ = sum(
        ids.tolist() != other or (weights > 0).tolist() != list(map(bool, mask))
        for (ids, weights), other, mask in pairs
    )
    assert differ * 1000 <= len(encoded), f"{differ} of {len(encoded)} rows differ"
    return differ


def _rows(samples: Samples) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    cuts = np.cumsum(samples.lengths)[:-1]
    return zip(np.split(samples.ids, cuts), np.split(samples.weights, cuts), strict=True)


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of CPU time with that of the processes it started (steadier on a busy machine)."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def whole_prepare(setting: Setting, processes: int) -> None:
    """Everything to the published, synced store and the data report."""
    with tempfile.TemporaryDirectory() as folder:
        request = PrepareRequest(
            sources=(SourceRequest(setting.source),),
            store_dir=Path(folder),
            tokenizer=setting.tokenizer,
            chat_template="chatml",
            workers=processes,
        )
        prepare(request)


def measure(setting: Setting, processes: int, rounds: int) -> dict[str, Any]:
    rows = len(setting.table)
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(setting, processes),
        "map, batched": lambda: mapped(setting, processes, batched=True),
        "map, row by row": lambda: mapped(setting, processes, batched=False),
        "ours, to the published store": lambda: whole_prepare(setting, processes),
    }
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            costs[name].append(cost(work))
    rates = {f"{name}, rows/s": rows / median(wall for wall, _ in found) for name, found in costs.items()}
    ratios = {}
    for name in ("map, batched", "map, row by row"):
        # Neighbours in time share the load of the machine: ratios are taken within each round.
        pairs = list(zip(costs["ours"], costs[name], strict=True))
        ratios[f"ratio to {name}"] = median(other[0] / own[0] for own, other in pairs)
        ratios[f"of CPU time, to {name}"] = median(other[1] / own[1] for own, other in pairs)
    return {"processes": processes, **rates, **ratios}


def real_setting(copies: int) -> tuple[Setting, int]:
    """The real chat data, so many times over, and the number of rows that differ between the two sides."""
    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core, on both sides
    source = Source("real", path=(f"{shared_data()}/*.jsonl",) * copies)
    rows = [row for row in conversations(source) if isinstance(row, Conversation)]
    tokenizer: PreTrainedTokenizerBase = train_tokenizer((t for row in rows for t in texts_of(row)), VOCABULARY)
    messages = [[{"role": m.role, "content": m.content} for m in row.messages] for row in rows]
    setting = Setting(
        source, tokenizer, ChatTemplate.of(tokenizer, "chatml"), datasets.Dataset.from_dict({"messages": messages})
    )
    differ = rows_that_differ(setting)
    gc.freeze()  # neither side should pay for walking the rows that this benchmark holds
    return setting, differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1, help="take the data several times over")
    options = parser.parse_args()
    setting, differ = real_setting(options.copies)
    table = [measure(setting, processes, options.rounds) for processes in options.processes]
    figures: dict[str, Any] = {"rows": len(setting.table), "rows that differ": differ, "rounds": options.rounds}
    figures["load before the end"] = load()
    about = "Rows per second from raw rows to ids and proven masks, beside datasets.map of apply_chat_template."
    Result("prepare", command("benchmarks.prepare"), figures, table, about).save()


if __name__ == "__main__":
    main()
