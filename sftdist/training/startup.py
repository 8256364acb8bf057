"""The start-up contract: ten checks before step 1, in order, each printed with its figures.

A check is a callable that returns its figures or raises. None leaves a trace: a run with the checks is bit-equal
to one without.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftdist.core.distributed import World
from sftdist.core.errors import ConfigError, DataError, SftdistError, StartupError


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
        failure: SftdistError | None = None
        try:
            figures = check.figures()
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
        say(f"check {number:2d}/{len(checks)} {check.name}: {figures} ({time.perf_counter() - started:.1f} s)")


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

    `untrained_rows`: ids of template tokens whose embedding was never trained; `trained`: this run trains them.
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
    rows = f"; {len(untrained_rows)} untrained template rows are trained too" if untrained_rows else ""
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


def check_rows(vocabulary_rows: int, largest_id: int) -> str:
    """The embedding has a row for every id in the stores."""
    if largest_id >= vocabulary_rows:
        raise ConfigError(
            f"model: token id {largest_id} is in the data, but the embedding has {vocabulary_rows} rows; it needs at "
            f"least {largest_id + 1}. Use the tokenizer that belongs to the model."
        )
    return f"{vocabulary_rows} embedding rows, largest id {largest_id}"


def check_disk(folder: Path, checkpoint_bytes: int) -> str:
    """Room for two checkpoints: the one that is written while the last one is still kept."""
    free = shutil.disk_usage(folder).free
    needed = 2 * checkpoint_bytes
    if free < needed:
        raise StartupError(
            f"{free / 2**30:.2f} GiB are free at {folder}, two checkpoints need {needed / 2**30:.2f} GiB. "
            "Free some space, or put run.dir on another disk."
        )
    return f"a checkpoint takes {checkpoint_bytes / 2**30:.3f} GiB, {free / 2**30:.1f} GiB free"


def check_grace(seconds: float, grace_seconds: float) -> str:
    """A save must fit into the time that a preemption leaves."""
    if seconds > grace_seconds:
        raise StartupError(
            f"a save would take about {seconds:.0f} s, but checkpoint.grace_seconds is {grace_seconds:.0f}. "
            f"Set checkpoint.grace_seconds={int(seconds * 1.5) + 1} (and the scheduler's grace to match)."
        )
    return f"about {seconds:.1f} s of {grace_seconds:.0f} s grace"


def compare_memory(predicted_bytes: float, measured_bytes: float, available_bytes: float, fixes: Sequence[str]) -> str:
    """Predicted against measured memory on the costliest pack; refuses when it would not fit."""
    figures = f"predicted {predicted_bytes / 2**30:.2f} GiB, measured {measured_bytes / 2**30:.2f} GiB"
    if measured_bytes > available_bytes:
        raise StartupError(
            f"memory: {figures}, but only {available_bytes / 2**30:.2f} GiB are there. Cheapest overrides that would "
            f"fit: {'; '.join(fixes)}"
        )
    return f"{figures} of {available_bytes / 2**30:.1f} GiB on the costliest pack"
