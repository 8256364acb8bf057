"""The start-up contract: ten checks before step 1, in order, each printed with its figures.

A check is a callable that returns its figures or raises. None leaves a trace: a run with the checks is bit-equal
to one without.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError, DataError, SftdistError, StartupError

GIB = 2**30
Found = TypeVar("Found")


@dataclass(frozen=True)
class Check:
    """One item of the contract: its name on the screen, and what finds its figures."""

    name: str
    figures: Callable[[], str]


class LocalFailure(StartupError):
    """Found by one rank in the middle of a collective: it cannot wait for the others to agree."""


def run_checks(world: World, checks: Sequence[Check], say: Callable[[str], None]) -> None:
    """Run every check on every rank; if one rank refuses, all ranks raise its error and nobody waits for it."""
    for number, check in enumerate(checks, 1):
        started = time.perf_counter()
        figures = together(world, check.figures)
        first, *more = figures.rstrip().split("\n")
        head = f"check {number:2d}/{len(checks)} {check.name}: {first} ({time.perf_counter() - started:.1f} s)"
        say("\n".join((head, *more)))


def together(world: World, find: Callable[[], Found]) -> Found:
    """What `find` returns; where it raises on one rank, every rank raises that error before its next collective."""
    failure: SftdistError | None = None
    try:
        found = find()
    except LocalFailure:
        raise
    except SftdistError as error:
        failure = error
    verdicts = world.gather_objects(None if failure is None else (type(failure), str(failure)))
    failed = [(rank, verdict) for rank, verdict in enumerate(verdicts) if verdict is not None]
    if failure is not None:
        raise failure
    if failed:
        rank, (kind, message) = failed[0]
        raise kind(f"{message} (found by rank {rank})")
    return found


def same_on_every_rank(world: World, what: str, value: str) -> str:
    """Raises `StartupError` when ranks hold different values; returns the first 12 characters of the common one."""
    values = world.gather_objects(value)
    if len(set(values)) > 1:
        listed = ", ".join(f"rank {rank}: {other[:12]}" for rank, other in enumerate(values))
        raise StartupError(
            f"{what} differs between ranks ({listed}); every rank must hold the same one. Start all ranks from the "
            "same checkout and the same token stores."
        )
    return f"{value[:12]} on {world.size} rank{'s' if world.size > 1 else ''}"


def ranks_of_this_host(world: World) -> int:
    """How many ranks share the memory of this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


@dataclass(frozen=True)
class Supervision:
    """What a source's store says about its masks: supervised tokens and tokens of the train split, and the share of
    conversations whose last supervised token is a stop token, and how many begin with two BOS tokens."""

    tokens: int
    supervised: float
    stopped: float
    doubled_bos: int


def check_supervision(sources: Mapping[str, Supervision], untrained_rows: Sequence[int], trained: bool) -> str:
    """Every source has supervised tokens, every answer ends in a stop token, no template token is untrained.

    `untrained_rows`: ids of template and new tokens whose embedding was never trained; `trained`: this run trains them.
    """
    for name, source in sources.items():
        if source.supervised <= 0:
            raise DataError(
                f"source {name}: no supervised token in {source.tokens} tokens; at least one is required. "
                "Look at it with `sftdist inspect`."
            )
        if source.stopped < 1.0:
            raise DataError(
                f"source {name}: only {source.stopped:.2%} of the conversations end their last supervised turn with a "
                "stop token; 100% are required, or the model never learns to stop. Check model.chat_template."
            )
    if untrained_rows and not trained:
        raise ConfigError(
            f"model: the chat template uses tokens {list(untrained_rows)} whose embedding rows were never trained; "
            "they must be trained. Use tune.method=full, or a template whose tokens this model knows."
        )
    shares = ", ".join(f"{name} {source.supervised / source.tokens:.1%}" for name, source in sources.items())
    rows = f"; {len(untrained_rows)} token rows that the base never trained are trained too" if untrained_rows else ""
    return f"supervised share {shares}; every answer ends with a stop token{rows}"


def check_bos(sources: Mapping[str, Supervision]) -> str:
    """No conversation begins with two BOS tokens: one from the template and one from the tokenizer."""
    for name, source in sources.items():
        if source.doubled_bos:
            raise DataError(
                f"source {name}: {source.doubled_bos} conversations begin with two BOS tokens; at most one is allowed. "
                "Run `prepare` again with a template that renders it once."
            )
    return "no conversation begins with two"


def check_dtypes(dtypes: Mapping[str, str], compute: str) -> str:
    """The forward computes in the configured dtype; masters and optimizer state are float32, so that small updates
    are not rounded away. `dtypes`: of `weights`, `masters` and each moment."""
    for name, dtype in dtypes.items():
        required = compute if name == "weights" else "float32"
        if dtype != required:
            raise StartupError(
                f"dtypes: {name} are {dtype}, they must be {required}. Set `precision` to what the weights are to "
                "be computed in, and remove keys of zero.deepspeed that change the type of what is trained."
            )
    return f"{', '.join(f'{name} {dtype}' for name, dtype in dtypes.items())}, cross-entropy float32"


def check_rows(vocabulary_rows: int, largest_id: int) -> str:
    """The embedding has a row for every id in the stores."""
    if largest_id >= vocabulary_rows:
        raise ConfigError(
            f"model: token id {largest_id} is in the data, but the embedding has {vocabulary_rows} rows; it needs at "
            f"least {largest_id + 1}. Use the tokenizer that belongs to the model."
        )
    return f"{vocabulary_rows} embedding rows, largest id {largest_id}"


def check_gradients(trainable: Sequence[str], reached: set[str], may_miss: bool) -> str:
    """A backward pass gives a gradient to everything that is to be trained; `may_miss`: experts that no token chose
    need not have one."""
    missed = [name for name in trainable if name not in reached]
    if not missed:
        return f"a gradient reaches all {len(trainable)} trained tensors"
    named = f"{', '.join(missed[:5])}{' ...' if len(missed) > 5 else ''}"
    if not may_miss:
        raise StartupError(
            f"{len(missed)} of {len(trainable)} tensors that are to be trained get no gradient ({named}); every one "
            "needs one, or it stays as it is. Set model.activation_checkpointing=false, or leave them out of "
            "tune.target."
        )
    return f"no gradient reaches {len(missed)} of {len(trainable)} trained tensors on this pack ({named})"


def check_disk(folder: Path, checkpoint_bytes: int, count: int) -> str:
    """Room for `count` more checkpoints: those that are kept, and the one that is written before the oldest goes."""
    free = shutil.disk_usage(folder).free
    needed = count * checkpoint_bytes
    if free < needed:
        raise StartupError(
            f"{free / GIB:.2f} GiB are free at {folder}, {count} more checkpoints need {needed / GIB:.2f} GiB. "
            "Free some space, set checkpoint.keep_last lower, or put run.dir on another disk."
        )
    return f"a checkpoint takes {checkpoint_bytes / GIB:.3f} GiB, {free / GIB:.1f} GiB free for {count} more"


def check_copy(copy_bytes: int, free_bytes: int) -> str:
    """Room in host memory for the copy from which a checkpoint is written in the background."""
    if free_bytes < copy_bytes:
        raise StartupError(
            f"checkpoint.background=true copies {copy_bytes / GIB:.2f} GiB to the memory of this host, but only "
            f"{free_bytes / GIB:.2f} GiB are free there. Set checkpoint.background=false."
        )
    return f"its copy {copy_bytes / GIB:.3f} GiB of {free_bytes / GIB:.1f} GiB free memory"


def check_grace(seconds: float, grace_seconds: float, torchrun_seconds: float | None) -> str:
    """A save must fit into the time that a preemption leaves, and torchrun (`torchrun_seconds`), where it is used."""
    if seconds > grace_seconds:
        raise StartupError(
            f"a save would take about {seconds:.0f} s, but checkpoint.grace_seconds is {grace_seconds:.0f}. "
            f"Set checkpoint.grace_seconds={int(seconds * 1.5) + 1} (and the scheduler's grace to match)."
        )
    if torchrun_seconds is not None and seconds > torchrun_seconds:
        raise StartupError(
            f"a save would take about {seconds:.0f} s, but this torchrun kills its ranks {torchrun_seconds:.0f} s "
            "after a signal. Start with `sftdist train`, which gives them checkpoint.grace_seconds, or give torchrun "
            f"--shutdown-timeout {math.ceil(grace_seconds)}."
        )
    least = grace_seconds if torchrun_seconds is None else min(grace_seconds, torchrun_seconds)
    return f"about {seconds:.1f} s of {least:.0f} s grace"


def compare_memory(predicted_bytes: float, measured_bytes: float, available_bytes: float) -> str:
    """Predicted against measured memory on the costliest pack, where it fits."""
    figures = f"predicted {predicted_bytes / GIB:.2f} GiB, measured {measured_bytes / GIB:.2f} GiB"
    return f"{figures} of {available_bytes / GIB:.1f} GiB on the costliest pack"
